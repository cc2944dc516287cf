// What steering changed: two runs of one request, from one seed.

import { button, el } from "../dom.js";
import { fixed, hue, visible } from "../format.js";
import { parting } from "./runs.js";
import { actionBadge } from "./verdicts.js";

/** A summary of a plain and a steered run that have ended. onShow(index): show that token of the answers. */
export function comparison(plain, steered, { domains, onShow }) {
  const apart = parting(plain, steered);
  const scoresOf = (run) => (Object.keys(run.end.response_scores ?? {}).length ? run.end.response_scores : run.end.prompt_scores ?? {});
  const [before, after] = [scoresOf(plain), scoresOf(steered)];
  const same = plain.end.action === steered.end.action;
  return el("section", { class: "pg-comparison" },
    el("h3", { text: "What steering changed" }),
    el("div", { class: "pg-comparison-facts" },
      apart === null
        ? el("p", { text: "The two answers say the same, token for token." })
        : apart.left === null || apart.right === null
          ? el("p", {}, `The ${apart.left === null ? "unsteered" : "steered"} answer ends before token ${apart.index}, where the other goes on with `, word(apart.left ?? apart.right), ".")
          : el("p", {}, `They part at token ${apart.index} of the answer: `, word(apart.left), " became ", word(apart.right), ". ",
          button("Show it", () => onShow(apart.index), { class: "btn small" })),
      el("p", {}, "Action: ", actionBadge(plain.end.action), same ? " in both." : [" became ", actionBadge(steered.end.action)])),
    el("div", { class: "table-box" }, el("table", {},
      el("caption", { class: "sr", text: "Domain scores of both runs" }),
      el("thead", {}, el("tr", {}, ["Domain", "Unsteered", "Steered", "Change"].map((text, i) => el("th", { text, class: i ? "num" : "", attrs: { scope: "col" } })))),
      el("tbody", {}, domains.filter((domain) => domain in before || domain in after).map((domain) => {
        const difference = (after[domain] ?? NaN) - (before[domain] ?? NaN);
        const change = Math.abs(difference) < 0.0005 ? 0 : difference; // no −0.000
        return el("tr", {},
          el("th", { attrs: { scope: "row" } }, el("span", { class: `pg-key ${hue(domain)}`, text: domain })),
          el("td", { class: "num", text: fixed(before[domain], 3) }),
          el("td", { class: "num", text: fixed(after[domain], 3) }),
          el("td", { class: `num ${Math.abs(change) < 0.005 ? "soft" : ""}`, text: `${change > 0 ? "+" : ""}${fixed(change, 3)}` }));
      })))));
}

function word(cell) {
  return el("bdi", { class: "pg-word", text: visible(cell.text) });
}
