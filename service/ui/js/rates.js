// Verdicts over time, a chart for each domain or one table for all of them.

import { ACTIONS, axisTop, binAt, legendMark, markBin, stackedBars } from "./charts.js";
import { button, el, replace, select } from "./dom.js";
import { clock, hue } from "./format.js";

const RANGES = [["5", "5 min"], ["15", "15 min"], ["60", "60 min"]];
const HEIGHT = 132;

/**
 * A panel over `store`. `now()`: the server's time in seconds. `since()`: words that say from when on the counts are whole.
 * `onRange` is called with the minutes chosen. draw() shows what is in the store now.
 */
export function ratesPanel({ store, now, since, minutes, onRange }) {
  let asTable = false;
  let drawn = null;
  const charts = el("div", { class: "rate-charts" });
  const source = el("p", { class: "soft rate-source" });
  const ranges = el("div", { class: "seg", attrs: { role: "group" }, aria: { label: "Time shown" } },
    RANGES.map(([value, text]) => button(text, () => choose(Number(value)), { class: "btn small", data: { range: value }, aria: { pressed: Number(value) === minutes } })));
  const table = button("Table", () => { asTable = !asTable; table.setAttribute("aria-pressed", asTable); draw(); }, { class: "btn small", aria: { pressed: false }, title: "Show the numbers as a table" });
  const element = el("section", { class: "panel rates", aria: { label: "Verdicts over time" } },
    el("header", {}, el("h2", { text: "Verdicts over time" }),
      el("ul", { class: "legend", aria: { label: "Legend" } }, ACTIONS.map((action) => el("li", {}, legendMark(action), action))),
      el("div", { class: "end" }, ranges, table)),
    el("div", { class: "body" }, charts, source));

  const resized = new ResizeObserver(() => draw());
  resized.observe(charts);
  charts.addEventListener("pointermove", point);
  charts.addEventListener("pointerleave", () => point(null));

  function choose(chosen) {
    minutes = chosen;
    for (const one of ranges.children) one.setAttribute("aria-pressed", Number(one.dataset.range) === minutes);
    onRange(minutes);
    draw();
  }

  function draw() {
    const bins = store.bins(minutes, now());
    drawn = bins;
    source.textContent = `${bins.width === 60 ? "Verdicts a minute" : "Verdicts in 10 seconds"}, ${since()}.`;
    charts.classList.toggle("as-table", asTable);
    if (asTable) {
      const place = charts.firstElementChild;
      const scrolled = place?.matches(".table-box") ? [place.scrollTop, place.scrollLeft] : [0, 0];
      const focused = place === document.activeElement;
      const box = ratesTable(bins, store.domains);
      replace(charts, box);
      box.scrollTo(scrolled[1], scrolled[0]);
      if (focused) box.focus();
      return;
    }
    const width = chartWidth(charts, store.domains.length);
    if (width < 80) return; // not laid out yet: the observer calls again
    const sums = bins.starts.map((_, bin) => Math.max(...store.domains.map((domain) => total(bins.series[domain], bin))));
    const top = axisTop(Math.max(1, ...sums));
    const ticks = ticksOf(bins);
    replace(charts, store.domains.map((domain) => {
      const series = bins.series[domain];
      const words = summary(series);
      return el("figure", { class: `rate ${hue(domain)}`, data: { domain } },
        el("figcaption", {}, el("span", { class: `badge ${hue(domain)}`, text: named(domain) }), el("span", { class: "soft reading", text: words })),
        stackedBars({ domain, series, ticks, top, width, height: HEIGHT, label: `${named(domain)}, last ${minutes} minutes: ${words}` }));
    }));
  }

  /** Say what lies under the pointer, in every chart: the same moment is compared across domains. */
  function point(event) {
    if (asTable || drawn === null) return;
    const over = event?.target.closest?.("svg.rate-chart");
    const bin = over ? binAt(event.clientX - over.getBoundingClientRect().left, over.clientWidth, drawn.starts.length) : null;
    for (const figure of charts.querySelectorAll("figure")) {
      const series = drawn.series[figure.dataset.domain];
      markBin(figure.querySelector("svg.rate-chart"), bin);
      figure.querySelector(".reading").textContent = bin === null ? summary(series) : `${beginning(drawn, bin)} · ${parts((action) => series[action][bin])}`;
    }
  }

  return { element, draw, stop: () => resized.disconnect() };
}

/** A domain's name; there are rules that are about none. */
export function named(domain) {
  return domain || "no domain";
}

/** Select of `values` with an entry for all of them; more can be added later. */
export function growingSelect(label, values, chosen, onChange) {
  const control = select([["", `All ${label}s`], ...values.map((value) => [value, value])], chosen, onChange, { "aria-label": label });
  const known = new Set(values);
  const add = (value) => {
    if (!value || known.has(value)) return;
    known.add(value);
    control.append(el("option", { text: value, attrs: { value } }));
  };
  if (chosen) add(chosen);
  control.value = chosen;
  return { control, add };
}

function total(series, bin) {
  return ACTIONS.reduce((sum, action) => sum + series[action][bin], 0);
}

function parts(count) {
  const found = ACTIONS.filter((action) => count(action) > 0).map((action) => `${count(action)} ${action}`);
  return found.length > 0 ? found.join(", ") : "none";
}

/** When a bin begins: without seconds where it is a minute. */
function beginning({ starts, width }, bin) {
  return clock(starts[bin]).slice(0, width % 60 === 0 ? 5 : 8);
}

function summary(series) {
  return parts((action) => series[action].reduce((sum, n) => sum + n, 0));
}

/** Round times, and the present at the end. */
function ticksOf({ starts, width }) {
  const span = starts.length * width;
  const step = span > 1800 ? 900 : span > 600 ? 300 : 60;
  const ticks = [];
  starts.forEach((start, bin) => {
    if (start % step < width && bin < 0.88 * starts.length) ticks.push([bin, clock(start).slice(0, 5)]);
  });
  ticks.push([starts.length, "now"]);
  return ticks;
}

function chartWidth(box, count) {
  const columns = box.clientWidth >= 1100 ? Math.min(4, count) : box.clientWidth >= 560 ? 2 : 1;
  box.style.setProperty("--columns", columns);
  return Math.floor((box.clientWidth - 20 * (columns - 1)) / columns);
}

function ratesTable({ starts, series, width }, domains) {
  const head = el("thead", {},
    el("tr", {}, el("th", { text: "From", attrs: { scope: "col", rowspan: 2 } }), domains.map((domain) => el("th", { text: named(domain), attrs: { scope: "colgroup", colspan: ACTIONS.length } }))),
    el("tr", {}, domains.map(() => ACTIONS.map((action) => el("th", { class: "num", text: action, attrs: { scope: "col" } })))));
  const rows = starts.map((_, bin) => el("tr", {}, el("th", { text: beginning({ starts, width }, bin), attrs: { scope: "row" } }),
    domains.map((domain) => ACTIONS.map((action) => el("td", { class: series[domain][action][bin] ? "num" : "num soft", text: series[domain][action][bin] })))));
  return el("div", { class: "table-box rate-table", attrs: { tabindex: 0, role: "region" }, aria: { label: "Verdicts over time, as a table" } },
    el("table", {}, el("caption", { class: "sr", text: `Verdicts by domain and action in steps of ${width} seconds, the newest first` }), head, el("tbody", {}, rows.reverse())));
}
