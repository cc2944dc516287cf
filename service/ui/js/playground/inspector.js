// What one token shows: its domain scores against their thresholds, and the features that are active on it.

import { button, el, replace, select, unique } from "../dom.js";
import { fixed, hue, visible } from "../format.js";

const FIRST = 12;
const CEILING = 2;

/** The panel of the selected token. page: {lookup(id) → summary or null, pins(), onPin(id), onSteer(id), canSteer}. */
export class Inspector {
  #shown = null; // {turn, run, cell, other}
  #all = false;

  constructor(page) {
    this.page = page;
    this.head = el("div", { class: "pg-token-head" });
    this.meters = el("div", { class: "pg-meters" });
    this.words = el("input", { class: "input", attrs: { type: "search", placeholder: "Filter by text", "aria-label": "Filter features" }, on: { input: () => this.#list() } });
    this.domain = select([["", "All domains"]], "", () => this.#list(), { "aria-label": "Domain of features" });
    this.body = el("tbody");
    this.count = el("span", { class: "soft" });
    this.more = button("", () => { this.#all = true; this.#list(); }, { class: "btn small" });
    const title = unique("features");
    this.filled = el("div", { class: "pg-inspector" }, this.head, this.meters,
      el("div", { class: "row between" }, el("h3", { text: "Active features", attrs: { id: title } }), this.count),
      el("div", { class: "pg-filter" }, this.words, this.domain),
      el("table", { class: "pg-features", attrs: { "aria-labelledby": title } },
        el("thead", {}, el("tr", {},
          el("th", { text: "Feature", attrs: { scope: "col" } }),
          el("th", { class: "num", text: "Activation", title: "1 is the feature's 99.9th percentile", attrs: { scope: "col" } }),
          el("th", { class: "num", text: "Contrib.", title: "The largest part it has in a domain's logit", attrs: { scope: "col" } }))),
        this.body),
      this.more);
    this.empty = el("div", { class: "empty" },
      el("p", { text: "Select a token to see its scores and the features behind them." }),
      el("p", { class: "pg-keys" }, el("kbd", { text: "←" }), el("kbd", { text: "→" }), " by token  ", el("kbd", { text: "↑" }), el("kbd", { text: "↓" }), " by line  ", el("kbd", { text: "Esc" }), " none"));
    this.element = el("div", {}, this.empty, this.filled);
    this.show(null);
  }

  /** Show a cell, null for none. shown: {run, other, cell, limits, domains}; other: the run beside it, or null. */
  show(shown) {
    this.#shown = shown;
    this.#all = false;
    this.empty.hidden = shown !== null;
    this.filled.hidden = shown === null;
    if (shown === null) return;
    const { cell, domains, run, other } = shown;
    const phase = cell.phase === "prompt" ? "prompt" : "answer";
    const number = cell.first === cell.index ? `${cell.index}` : `${cell.first}–${cell.index}`;
    replace(this.head, el("bdi", { class: "pg-token-text", text: visible(cell.text) }),
      el("span", { class: "soft", text: `token ${number} of the ${phase}${other ? `, ${run.name === "steered" ? "steered" : "unsteered"}` : ""}` }));
    replace(this.meters, domains.map((domain, i) => this.#meter(domain, i)));
    if (this.domain.options.length - 1 !== domains.length) {
      const kept = this.domain.value;
      replace(this.domain, [["", "All domains"], ...domains.map((domain) => [domain, domain])].map(([value, label]) => el("option", { text: label, attrs: { value, selected: value === kept } })));
    }
    this.#list();
  }

  /** Labels have come or pins have changed. */
  refresh() {
    if (this.#shown === null) return;
    // The rows are made anew; whoever has just pressed one of their buttons stays there.
    const row = document.activeElement?.closest(".pg-features tr")?.dataset.feature;
    const at = row ? [...document.activeElement.parentElement.children].indexOf(document.activeElement) : -1;
    this.#list();
    if (row) this.body.querySelector(`[data-feature="${CSS.escape(row)}"] .pg-feature-acts`)?.children[at]?.focus();
  }

  #meter(domain, column) {
    const { cell, other, run, limits } = this.#shown;
    const value = cell.s[column] ?? 0;
    const limit = limits.of(domain, cell.phase);
    const over = limit !== null && value >= limit;
    const beside = other?.cellOf(cell.phase, cell.index)?.s[column];
    const many = limits.tokens(domain, cell.phase);
    const bar = el("div", { class: "meter", attrs: { role: "meter" }, aria: { label: domain, valuemin: 0, valuemax: 1, valuenow: value.toFixed(4), valuetext: `${fixed(value)}${limit === null ? "" : ` of ${fixed(limit)}`}` } }, el("span"));
    bar.style.setProperty("--w", `${100 * value}%`);
    const track = el("div", { class: "pg-track" }, bar, limit === null ? null : el("i", { class: "pg-limit-mark", aria: { hidden: true } }));
    if (limit !== null) track.style.setProperty("--at", `${100 * limit}%`);
    const told = limit === null ? "no rule" : over ? `≥ ${fixed(limit)}` : `of ${fixed(limit)}`;
    return el("div", { class: `pg-meter ${hue(domain)} ${over ? "over" : ""}`, title: limit === null ? "The policy has no rule on it here" : `A verdict takes ${many} ${many === 1 ? "token" : "tokens in agreement"}` },
      el("span", { class: "pg-meter-name", text: domain }), track,
      el("b", { class: "num", text: fixed(value) }), el("span", { class: "soft pg-meter-limit", text: told }),
      beside === undefined ? null : el("span", { class: "soft pg-meter-beside", text: `${run.name === "steered" ? "unsteered" : "steered"} ${fixed(beside)}` }));
  }

  #list() {
    const { cell } = this.#shown;
    const words = this.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const domain = this.domain.value;
    const found = cell.f.filter(([id]) => {
      const feature = this.page.lookup(id);
      const text = `${id} ${feature?.explanation ?? ""} ${feature?.concepts?.join(" ") ?? ""}`.toLowerCase();
      return words.every((word) => text.includes(word)) && (!domain || feature?.domains?.includes(domain));
    });
    const shown = this.#all ? found : found.slice(0, FIRST);
    this.count.textContent = found.length === cell.f.length ? `${cell.f.length}` : `${found.length} of ${cell.f.length}`;
    const none = cell.f.length === 0 ? "No feature of the bank is active on this token." : "None of this token's features fits the filter.";
    replace(this.body, shown.map((feature) => this.#row(feature)),
      shown.length ? null : el("tr", {}, el("td", { class: "soft", text: none, attrs: { colspan: 3 } })));
    this.more.textContent = `Show all ${found.length}`;
    this.more.hidden = found.length <= shown.length;
  }

  #row([id, activation, contribution]) {
    const feature = this.page.lookup(id);
    const pinned = this.page.pins().includes(id);
    const bar = el("div", { class: "meter" }, el("span"));
    bar.style.setProperty("--w", `${Math.min(100, (100 * activation) / CEILING)}%`);
    const words = feature?.explanation ?? "";
    return el("tr", { data: { feature: id } },
      el("td", {},
        el("div", { class: "pg-clamp", text: words, title: words, attrs: { dir: "auto" } }),
        el("div", { class: "pg-feature-facts" }, el("span", { class: "mono", text: id }), el("span", { class: "pg-feature-acts" },
          button(pinned ? "Unpin" : "Pin", () => this.page.onPin(id), { class: "btn ghost small", aria: { pressed: pinned, label: `${pinned ? "Unpin" : "Pin"} ${id}` } }),
          this.page.canSteer ? button("Steer", () => this.page.onSteer(id), { class: "btn ghost small", aria: { label: `Steer ${id}` } }) : null,
          el("a", { class: "btn ghost small", text: "Explore", attrs: { href: `#/explorer?feature=${encodeURIComponent(id)}` }, aria: { label: `Explore ${id}` } }))),
        feature ? el("div", { class: "pg-feature-facts soft", text: `layer ${feature.layer} · AUROC ${fixed(feature.auroc)} · fidelity ${fixed(feature.fidelity)}` }) : null,
        el("div", { class: "pg-feature-facts" }, (feature?.domains ?? []).map((domain) => el("span", { class: `badge ${hue(domain)}`, text: domain })))),
      el("td", { class: "num" }, el("span", { text: fixed(activation) }), bar),
      el("td", { class: "num", text: fixed(contribution) }));
  }
}
