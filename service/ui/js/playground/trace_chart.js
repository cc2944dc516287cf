// Scores and pinned features over the whole text: a row each, one point a token, or the highest of several.

import { button, el, replace, svg } from "../dom.js";
import { fixed, hue, visible } from "../format.js";
import { split } from "./runs.js";

const POINTS = 480;
const EVERY = 250; // milliseconds between drawings while tokens come

/** Rows of traces. page: {onSelect(at), onHint(at or null), onUnpin(id), explain(id)}. */
export class TraceChart {
  #rows = [];
  #timer = 0;
  #shown = null; // {run, other, limits, mode}

  constructor(page) {
    this.page = page;
    this.rows = el("div", { class: "pg-trace-rows" });
    this.note = el("span", { class: "soft" });
    this.element = el("details", { class: "panel pg-traces", attrs: { id: "pg-traces", open: true } },
      el("summary", {}, el("span", { text: "Traces" }), this.note), this.rows);
    this.element.hidden = true;
  }

  /** Show a run; other: one to compare it with, or null. keys: `domain:NAME` and `feature:ID`, in order. */
  show(run, other, limits, keys, pins) {
    this.#shown = run === null ? null : { run, other, limits };
    this.element.hidden = run === null || run.cells.length === 0;
    if (this.element.hidden) return;
    this.note.textContent = other ? (run.name === "steered" ? "steered; thin line: unsteered" : "unsteered; thin line: steered") : "";
    const same = keys.join() === this.#rows.map((row) => row.key).join();
    if (!same) {
      this.#rows = keys.map((key) => this.#row(key, pins));
      replace(this.rows, this.#rows.map((row) => row.element));
    }
    this.#drawAll();
  }

  /** More cells have come. */
  grow() {
    if (this.#shown === null || this.#timer) return;
    this.#timer = setTimeout(() => { this.#timer = 0; this.#drawAll(); }, EVERY);
  }

  /** Mark the cell that is selected. */
  select(at) {
    this.at = at;
    for (const row of this.#rows) this.#point(row, at);
  }

  /** Let go of timers. */
  close() {
    clearTimeout(this.#timer);
    this.#timer = 0;
  }

  #row(key, pins) {
    const [kind, name] = split(key);
    const colour = kind === "domain" ? hue(name) : `p${pins.indexOf(name)}`;
    const explanation = kind === "feature" ? this.page.explain(name) : null;
    const label = kind === "domain" ? name : `${name} ${explanation ?? ""}`;
    const row = { key, kind, name };
    row.area = svg("path", { class: "pg-area" });
    row.ghost = svg("path", { class: "pg-ghost" });
    row.line = svg("path", { class: "pg-line" });
    row.limit = svg("path", { class: "pg-limit" });
    row.boundary = svg("path", { class: "pg-boundary" });
    row.cursor = svg("path", { class: "pg-cursor" });
    row.value = el("span", { class: "pg-trace-value num" });
    row.chart = svg("svg", { class: "pg-trace-chart", attrs: { preserveAspectRatio: "none", role: "slider", tabindex: "0" }, aria: { label: `${label} over the text`, valuemin: 0 },
      on: {
        pointermove: (event) => this.#hover(event, event.buttons === 1),
        pointerdown: (event) => this.#hover(event, true),
        pointerleave: () => this.#leave(),
        keydown: (event) => this.#pressed(event),
      } }, row.area, row.ghost, row.limit, row.boundary, row.line, row.cursor);
    row.element = el("div", { class: `pg-trace ${colour} ${kind}`, data: { series: key } },
      el("span", { class: "pg-trace-name", title: label },
        svg("svg", { class: "pg-swatch", attrs: { viewBox: "0 0 24 8", "aria-hidden": "true" } }, svg("path", { class: "pg-line", attrs: { d: "M0 4H24" } })),
        kind === "domain" ? el("span", { text: name }) : [el("span", { class: "mono", text: name }), explanation ? el("span", { class: "soft pg-trace-words", text: explanation, attrs: { dir: "auto" } }) : null]),
      row.chart, row.value,
      kind === "feature" ? button("×", () => { this.page.onUnpin(name); this.element.firstElementChild.focus(); }, { class: "btn ghost small pg-unpin", title: `Unpin ${name}`, aria: { label: `Unpin ${name}` } }) : el("span"));
    return row;
  }

  #drawAll() {
    if (this.#shown === null) return;
    for (const row of this.#rows) this.#draw(row);
    this.select(this.at ?? null);
  }

  #draw(row) {
    const { run, other, limits } = this.#shown;
    const values = run.series(row.key);
    const count = Math.max(values.length, other?.cells.length ?? 0, 2);
    const bins = Math.min(count, POINTS);
    const highest = Math.max(1, values.reduce((most, value) => Math.max(most, value), 0));
    const y = (value) => (1 - value / highest) * 100;
    const draw = (all) => binned(all, count, bins).map((value, i) => `${i ? "L" : "M"}${i} ${y(value).toFixed(1)}`).join("");
    row.chart.setAttribute("viewBox", `0 -4 ${bins - 1} 108`);
    row.chart.setAttribute("aria-valuemax", Math.max(0, values.length - 1));
    const line = draw(values);
    const end = Math.max(0, Math.ceil((values.length / count) * bins) - 1);
    row.line.setAttribute("d", line);
    row.area.setAttribute("d", line && `${line}L${end} 100L0 100Z`);
    row.ghost.setAttribute("d", other ? draw(other.series(row.key)) : "");
    const across = (value) => (value === null ? "" : `M0 ${y(value).toFixed(1)}H${bins - 1}`);
    const edge = run.boundary === null ? null : place(run.boundary, count, bins);
    // Where the policy has different thresholds for prompt and answer, each has its part of the line.
    row.limit.setAttribute("d", row.kind === "feature" ? (highest > 1 ? across(1) : "") : this.#limits(row.name, limits, edge, bins, y));
    row.boundary.setAttribute("d", edge === null || edge === 0 ? "" : `M${edge - 0.5} -4V104`);
    Object.assign(row, { count, bins });
  }

  #limits(domain, limits, edge, bins, y) {
    const parts = edge === null ? [["prompt", 0, bins - 1]] : [["prompt", 0, edge], ["response", edge, bins - 1]];
    return parts.map(([phase, from, to]) => {
      const limit = limits.of(domain, phase);
      return limit === null ? "" : `M${from} ${y(limit).toFixed(1)}H${to}`;
    }).join("");
  }

  #point(row, at) {
    const value = at === null ? undefined : this.#shown?.run.series(row.key)[at];
    row.cursor.setAttribute("d", value === undefined ? "" : `M${place(at, row.count, row.bins)} -4V104`);
    row.value.textContent = value === undefined ? "" : fixed(value);
    row.chart.setAttribute("aria-valuenow", at ?? 0);
    row.chart.setAttribute("aria-valuetext", value === undefined ? "no token selected" : `${visible(this.#shown.run.cells[at].text)}, ${fixed(value)}`);
  }

  #hover(event, choose) {
    const row = this.#rows.find((one) => one.chart === event.currentTarget);
    const box = row.chart.getBoundingClientRect();
    const cells = this.#shown.run.cells.length;
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const at = Math.min(cells - 1, Math.round(share * (row.count - 1)));
    for (const one of this.#rows) this.#point(one, at);
    if (choose) this.page.onSelect(at);
    else this.page.onHint(at);
  }

  #leave() {
    this.page.onHint(null);
    this.select(this.at ?? null);
  }

  #pressed(event) {
    const last = this.#shown.run.cells.length - 1;
    const at = this.at ?? 0;
    const to = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, PageUp: at + 10, PageDown: at - 10, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.page.onSelect(Math.min(last, Math.max(0, to)));
  }
}

/** At most `bins` values of `count`: the highest of those that fall together, so that no peak is lost. */
function binned(values, count, bins) {
  if (bins === count) return values;
  const most = [];
  for (let at = 0; at < values.length; at += 1) {
    const bin = place(at, count, bins);
    most[bin] = Math.max(most[bin] ?? 0, values[at]);
  }
  return most;
}

function place(at, count, bins) {
  return Math.floor((at * bins) / count);
}
