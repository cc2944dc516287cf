// What a comparison found: a headline, the mean changes, and a row for each text with both sides.

import { dumbbell, signed } from "./charts.js";
import { asCsv, asJson, download } from "./compare_export.js";
import { button, el, select, unique } from "./dom.js";
import { hitsTable } from "./event_detail.js";
import { fixed, hue } from "./format.js";
import { named } from "./rates.js";

const MOVED = 0.1; // a score that changes by so much is worth a look even where no threshold lies between
const TONES = { allow: "good", flag: "warn", steer: "warn", block: "bad" };
const SEVERITY = { allow: 0, flag: 1, steer: 2, block: 3 };

/**
 * The panel of `result`: {left, right: {bank, policy}, role, domains, rows: [{index, text, left, right, changed}],
 * summary, total}. filters: {changed, domain, open: indices of open rows}, which it changes. complete: no more will come.
 */
export function comparisonPanel({ result, filters, complete }) {
  const { rows, summary, domains } = result;
  const onlyChanged = button("Only what changes", () => { filters.changed = !filters.changed; filter(); }, { class: "btn small", aria: { pressed: filters.changed } });
  const byDomain = select([["", "All domains"], ...domains.map((domain) => [domain, named(domain)])], filters.domain, (value) => { filters.domain = value; filter(); },
    { "aria-label": "Domain", title: `Texts that either side flags for the domain, or whose score changes by ${MOVED} or more` });
  const shown = el("p", { class: "soft count", attrs: { role: "status" } });
  const empty = el("p", { class: "empty", attrs: { hidden: true } });
  const body = el("tbody", {}, [...rows].sort(changedFirst).map((row) => rowOf(row, domains)));
  const stem = `comparison-${result.left.policy}-${result.right.policy}`.replace(/[^\w.-]+/g, "_").slice(0, 80);
  const element = el("section", { class: "panel comparison", aria: { label: "Comparison" } },
    el("header", {}, el("h2", { text: "What changes" }), el("div", { class: "end" },
      button("JSON", () => download(`${stem}.json`, "application/json", asJson(result)), { class: "btn small", aria: { label: "Save as JSON" } }),
      button("CSV", () => download(`${stem}.csv`, "text/csv", asCsv(result)), { class: "btn small", aria: { label: "Save as CSV" } }))),
    el("div", { class: "body stack" }, headline(result, complete), means(summary, domains)),
    el("div", { class: "compare-filters" }, onlyChanged, byDomain, shown, el("p", { class: "soft key", text: "Scores from 0 to 1: hollow A, full B; underlined where the side flags the text." })),
    el("div", { class: "table-box" }, el("table", { class: "compare-table" },
      el("caption", { class: "sr", text: "Texts under both sides, those that change first" }),
      el("thead", {}, el("tr", {}, ["Text", "A", "B"].map((text) => el("th", { text, attrs: { scope: "col" } })),
        domains.map((domain) => el("th", { attrs: { scope: "col" } }, el("span", { class: `badge ${hue(domain)}`, text: named(domain) }))))),
      body)), empty);

  body.addEventListener("click", (event) => {
    const opener = event.target.closest("tr.text-row")?.querySelector(".opener");
    if (opener && (event.target.closest(".opener") || !getSelection()?.toString())) toggle(opener);
  });

  function toggle(opener) {
    const line = opener.closest("tr");
    const open = opener.getAttribute("aria-expanded") !== "true";
    let detail = line.nextElementSibling;
    if (!detail?.matches(".text-detail")) {
      const row = rows.find((one) => one.index === Number(line.dataset.index));
      detail = el("tr", { class: "text-detail", attrs: { id: unique("compared") } }, el("td", { attrs: { colspan: 3 + domains.length } },
        el("p", { class: "whole-text", text: row.text, attrs: { dir: "auto" } }),
        el("div", { class: "both" }, sideDetail("A", row.left), sideDetail("B", row.right))));
      opener.setAttribute("aria-controls", detail.id);
      line.after(detail);
    }
    detail.hidden = !open;
    opener.setAttribute("aria-expanded", open);
    line.classList.toggle("open", open);
    if (open) filters.open.add(Number(line.dataset.index));
    else filters.open.delete(Number(line.dataset.index));
  }

  function filter() {
    onlyChanged.setAttribute("aria-pressed", filters.changed);
    let count = 0;
    for (const line of body.querySelectorAll("tr.text-row")) {
      const row = rows.find((one) => one.index === Number(line.dataset.index));
      line.hidden = (filters.changed && !row.changed) || (filters.domain !== "" && !concerns(row, filters.domain));
      if (!line.hidden) count += 1;
      const detail = line.nextElementSibling;
      if (detail?.matches(".text-detail")) detail.hidden = line.hidden || !line.classList.contains("open");
    }
    shown.textContent = count === rows.length ? `${rows.length} shown` : `${count} of ${rows.length} shown`;
    empty.hidden = count > 0;
    empty.textContent = filters.changed && summary.changed === 0 ? "Both sides do the same with every text." : "No text is as the filters want it.";
  }

  for (const line of [...body.children]) if (filters.open.has(Number(line.dataset.index))) toggle(line.querySelector(".opener"));
  filter();
  return { element };
}

function headline({ rows, summary, left, right, total }, complete) {
  const part = (n, words, tone) => el("span", { class: `badge ${n > 0 ? tone : ""}`, text: `${n} ${words}` });
  return el("div", { class: "headline" },
    el("p", { class: "big" }, el("strong", { text: summary.changed }), ` of ${rows.length} ${rows.length === 1 ? "text changes" : "texts change"}`),
    el("p", { class: "row" }, part(summary.newly_blocked, "newly blocked", "bad"), part(summary.newly_allowed, "newly allowed", "good"),
      complete ? null : el("span", { class: "badge warn", text: `${rows.length} of ${total} texts compared` })),
    el("dl", { class: "facts against" }, [["A", left], ["B", right]].map(([mark, side]) => [el("dt", { class: "side-mark", text: mark }),
      el("dd", {}, el("bdi", { class: "mono", text: side.bank }), el("span", { class: "soft", text: " under " }), el("bdi", { class: "mono", text: side.policy }))])));
}

function means(summary, domains) {
  return el("dl", { class: "means", aria: { label: "Mean change of the scores, B less A" } }, domains.map((domain) => {
    const change = summary.mean_score_change[domain] ?? null;
    const bar = el("span", { class: `shift ${hue(domain)} ${change < 0 ? "down" : "up"}`, aria: { hidden: true } }, el("i"));
    // A tenth on either side is much for a mean.
    bar.style.setProperty("--w", `${Math.min(50, 500 * Math.abs(change ?? 0))}%`);
    return el("div", { data: { domain } }, el("dt", {}, el("span", { class: `badge ${hue(domain)}`, text: named(domain) })),
      el("dd", { title: "Mean change of the score, B less A" }, el("span", { class: "num", text: change === null ? "–" : signed(change) }), bar));
  }));
}

function rowOf(row, domains) {
  const opener = el("button", { class: "opener", attrs: { type: "button" }, aria: { expanded: false } },
    el("span", { class: "clip", text: row.text, attrs: { dir: "auto" } }));
  return el("tr", { class: "text-row", data: { index: row.index, changed: row.changed, left: row.left.action, right: row.right.action } },
    el("td", { class: "text" }, row.changed ? el("span", { class: "mark", title: "changes" }, el("span", { class: "sr", text: "Changes. " })) : null,
      el("div", { class: "numbered" }, el("span", { class: "soft num", text: row.index + 1 }), opener)),
    el("td", { class: "act", data: { label: "A" } }, el("span", { class: `badge ${TONES[row.left.action]}`, text: row.left.action })),
    el("td", { class: "act", data: { label: "B" } }, el("span", { class: "arrow soft", text: "→", aria: { hidden: true } }), el("span", { class: `badge ${TONES[row.right.action]}`, text: row.right.action })),
    domains.map((domain) => scoreCell(row, domain)));
}

function scoreCell({ left, right }, domain) {
  const from = left.scores[domain];
  const to = right.scores[domain];
  const number = (value, flagged) => el(flagged ? "strong" : "span", { text: fixed(value), title: flagged ? "flagged" : undefined }, flagged ? el("span", { class: "sr", text: " (flagged)" }) : null);
  return el("td", { class: `scores ${hue(domain)}`, data: { domain, label: named(domain) } },
    el("span", { class: "pair" }, number(from, left.flagged[domain]), el("span", { class: "soft", text: " → " }), number(to, right.flagged[domain])),
    from === undefined || to === undefined ? null : dumbbell(from, to, domain));
}

function sideDetail(mark, side) {
  return el("section", { class: "side-detail", data: { side: mark } },
    el("h3", {}, el("span", { class: "side-mark", text: mark }), el("span", { class: `badge ${TONES[side.action]}`, text: side.action })),
    side.verdicts.length === 0 ? el("p", { class: "soft", text: "No rule applied." }) : side.verdicts.map((verdict) => el("div", { class: "verdict" },
      el("p", { class: "row" }, el("strong", {}, el("bdi", { text: verdict.rule })), el("span", { class: `badge ${TONES[verdict.action]}`, text: verdict.action }), el("span", { class: `badge ${hue(verdict.domain)}`, text: named(verdict.domain) })),
      el("p", { class: "soft", text: `Score ${fixed(verdict.score)} against ${fixed(verdict.threshold)}, ${verdict.phase}, token ${verdict.token_index}` }),
      hitsTable(verdict.features, verdict.domain))));
}

function concerns(row, domain) {
  return row.left.flagged[domain] || row.right.flagged[domain] || Math.abs((row.right.scores[domain] ?? 0) - (row.left.scores[domain] ?? 0)) >= MOVED;
}

function changedFirst(one, other) {
  return other.changed - one.changed || (one.changed ? step(other) - step(one) : 0) || one.index - other.index;
}

function step(row) {
  return Math.abs(SEVERITY[row.right.action] - SEVERITY[row.left.action]);
}
