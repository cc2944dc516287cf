// Small charts as SVG. What they show stands beside them as text or as a table: colour and shape are never the only sign.

import { el, svg, unique } from "./dom.js";
import { fixed, hue } from "./format.js";

/** What a verdict did, weakest first: the order in which bars are stacked. */
export const ACTIONS = ["flag", "steer", "block"];

const LEFT = 30;
const RIGHT = 6;
const TOP = 8;
const BOTTOM = 20;

/** The smallest round number of verdicts that is no less than `highest`, for the top of an axis. */
export function axisTop(highest) {
  for (let power = 1; ; power *= 10) {
    for (const step of [2, 4, 6, 10]) if (step * power >= highest) return step * power;
  }
}

/**
 * Bars over time, the actions stacked: a light one for flag, a hatched one for steer, a full one for block.
 * series: {flag, steer, block}, a number for each bin. ticks: [bin, text]. top: end of the axis. width, height: pixels.
 */
export function stackedBars({ domain, series, ticks, top, width, height, label }) {
  const hatch = unique("hatch");
  const count = series.flag.length;
  const step = (width - LEFT - RIGHT) / count;
  const floor = height - BOTTOM;
  const scale = (floor - TOP) / top;
  const marks = [];
  for (const value of [0, top / 2, top]) {
    const y = Math.round(floor - value * scale) + 0.5;
    marks.push(svg("line", { class: "gridline", attrs: { x1: LEFT, x2: width - RIGHT, y1: y, y2: y } }));
    marks.push(svg("text", { class: "axis", text: value, attrs: { x: LEFT - 6, y: y + 4, "text-anchor": "end" } }));
  }
  for (const [bin, text] of ticks) {
    const anchor = bin < 0.05 * count ? "start" : bin >= count ? "end" : "middle";
    marks.push(svg("text", { class: "axis", text, attrs: { x: LEFT + bin * step, y: height - 5, "text-anchor": anchor } }));
  }
  const bars = [];
  for (let bin = 0; bin < count; bin += 1) {
    let base = 0;
    for (const action of ACTIONS) {
      const value = series[action][bin];
      if (!value) continue;
      const attrs = { x: (LEFT + bin * step + 0.5).toFixed(2), width: Math.max(1, step - 1.5).toFixed(2), y: (floor - (base + value) * scale).toFixed(2), height: (value * scale).toFixed(2) };
      if (action === "steer") attrs.fill = `url(#${hatch})`;
      bars.push(svg("rect", { class: `bar ${action}`, attrs }));
      base += value;
    }
  }
  return svg("svg", { class: `rate-chart ${hue(domain)}`, attrs: { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" }, aria: { label } },
    svg("defs", {}, hatching(hatch)), marks, bars,
    svg("rect", { class: "cursor", attrs: { x: 0, y: TOP, width: Math.max(1, step), height: floor - TOP, visibility: "hidden" } }));
}

/** The bin of a chart `width` pixels wide with `count` bins that lies under the pixel `x`, or null. */
export function binAt(x, width, count) {
  const bin = Math.floor(((x - LEFT) / (width - LEFT - RIGHT)) * count);
  return bin >= 0 && bin < count ? bin : null;
}

/** Mark one bin of a chart that `stackedBars` made, or none with null. */
export function markBin(chart, bin) {
  const cursor = chart.querySelector(".cursor");
  cursor.setAttribute("visibility", bin === null ? "hidden" : "visible");
  if (bin !== null) cursor.setAttribute("x", LEFT + bin * Number(cursor.getAttribute("width")));
}

function hatching(id) {
  return svg("pattern", { attrs: { id, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" } },
    svg("rect", { class: "hatch-ground", attrs: { width: 5, height: 5 } }),
    svg("line", { class: "hatch-line", attrs: { x1: 0, y1: 0, x2: 0, y2: 5 } }));
}

/** What a bar of `action` looks like, for a legend. */
export function legendMark(action) {
  const hatch = unique("hatch");
  const attrs = { x: 0.5, y: 0.5, width: 13, height: 11 };
  if (action === "steer") attrs.fill = `url(#${hatch})`;
  return svg("svg", { class: "legend-mark d-other", attrs: { width: 14, height: 12 }, aria: { hidden: true } },
    svg("defs", {}, hatching(hatch)), svg("rect", { class: `bar ${action}`, attrs }));
}

/** A score as a bar with a tick at its threshold. Scores of rules on a concept or a feature may be above 1. */
export function scoreMeter(score, threshold, domain) {
  const end = Math.max(1, score ?? 0, threshold ?? 0);
  const meter = el("span", { class: `meter score-meter ${hue(domain)}`, aria: { hidden: true } }, el("span"), el("i"));
  meter.style.setProperty("--w", `${100 * clamp(score / end)}%`);
  meter.style.setProperty("--t", `${100 * clamp(threshold / end)}%`);
  return meter;
}

/** A bar of a share between 0 and 1. */
export function shareBar(share, tone = "") {
  const bar = el("span", { class: `meter share ${tone}`, aria: { hidden: true } }, el("span"));
  setShare(bar, share);
  return bar;
}

/** Change the share that a bar shows. */
export function setShare(bar, share) {
  bar.style.setProperty("--w", `${100 * clamp(share)}%`);
}

/** Two scores on one line from 0 to 1: the left one hollow, the right one full, and what lies between. */
export function dumbbell(left, right, domain) {
  const width = 92;
  const at = (value) => (5 + clamp(value) * (width - 10)).toFixed(1);
  return svg("svg", { class: `dumbbell ${hue(domain)}`, attrs: { width, height: 14, viewBox: `0 0 ${width} 14` }, aria: { hidden: true } },
    svg("line", { class: "track", attrs: { x1: 5, x2: width - 5, y1: 7, y2: 7 } }),
    svg("line", { class: "span", attrs: { x1: at(left), x2: at(right), y1: 7, y2: 7 } }),
    svg("circle", { class: "from", attrs: { cx: at(left), cy: 7, r: 3.5 } }),
    svg("circle", { class: "to", attrs: { cx: at(right), cy: 7, r: 4.5 } }));
}

/** A change of a score with its sign. */
export function signed(value, digits = 3) {
  const text = fixed(value, digits);
  return value > 0 && Number(value.toFixed(digits)) > 0 ? `+${text}` : Number(value?.toFixed(digits)) === 0 ? fixed(0, digits) : text;
}

function clamp(value) {
  return Math.min(1, Math.max(0, Number.isFinite(value) ? value : 0));
}
