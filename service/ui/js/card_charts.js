// Charts of a feature's card: values with their intervals and nulls on a line, in tables that say the same in numbers.

import { el, svg } from "./dom.js";
import { fixed, hue, percent, whole } from "./format.js";

const AUROC = { low: 0.25, high: 1, zero: 0.5, ticks: [0.25, 0.5, 0.75, 1] };
const CORRELATION = { low: -0.25, high: 1, zero: 0, ticks: [0, 0.5, 1] };
const REACHES = [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64];

/** A number with its sign, as a change is written. */
export function signed(value) {
  return `${value > 0 ? "+" : ""}${fixed(value)}`;
}

/** An interval in words; empty where there is none. */
export function interval(low, high) {
  return low === undefined || low === null || high === undefined || high === null ? "" : `${fixed(low)} to ${fixed(high)}`;
}

/** Set custom properties: where a mark lies, in per cent. */
export function place(element, values) {
  for (const [name, value] of Object.entries(values)) element.style.setProperty(`--${name}`, value);
  return element;
}

/** The histogram of a feature's activations, with its threshold and quantiles. Heights grow with the logarithm. */
export function activationChart(feature) {
  const fired = feature.histogram.reduce((sum, count) => sum + count, 0);
  if (fired === 0) return null;
  const heights = feature.histogram.map((count) => Math.log1p(count));
  const top = Math.max(...heights);
  const width = 100 / heights.length;
  const bars = heights.map((height, index) => height === 0 ? null
    : svg("rect", { attrs: { x: index * width + 0.3, width: width - 0.6, y: 100 - Math.max(2, 100 * height / top), height: Math.max(2, 100 * height / top) } },
      svg("title", { text: `${binName(index, heights.length)}: ${whole(feature.histogram[index])} tokens` })));
  const threshold = feature.threshold / feature.scale;
  const quantiles = Object.entries(feature.quantiles).map(([name, value]) => ({ name: `${Number((100 * Number(name)).toFixed(1))} %`, value }));
  const words = quantiles.map(({ name, value }) => `${name} at ${fixed(value)}`).join(", ");
  // Those beyond the end stand there together.
  const beyond = quantiles.filter(({ value }) => value >= 1);
  const marks = [...quantiles.filter(({ value }) => value < 1), ...(beyond.length ? [{ name: beyond.map(({ name }) => name).join(", "), value: beyond[0].value }] : [])];
  return el("figure", { class: "activations" },
    el("div", { class: "act-plot" },
      svg("svg", { attrs: { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": `Histogram of ${whole(fired)} firing tokens; threshold at ${fixed(threshold)}; quantiles: ${words}` } }, bars),
      mark("act-threshold", threshold, "threshold"),
      marks.map(({ name, value }) => mark("act-quantile", value, name))),
    el("div", { class: "scale", aria: { hidden: true } }, [[0, "0"], [25, "0.25"], [50, "0.5"], [75, "0.75"], [100, "1+"]].map(([at, text]) => place(el("span", { text }), { at }))),
    el("figcaption", { class: "soft" },
      `${whole(fired)} firing tokens. Threshold ${fixed(threshold)}`,
      quantiles.length ? `; quantiles ${words}.` : ".",
      " Activations are divided by the 99.9th percentile; heights are logarithmic."));
}

function binName(index, bins) {
  return index === bins - 1 ? `${fixed(index / bins)} and above` : `${fixed(index / bins)} to ${fixed((index + 1) / bins)}`;
}

function mark(kind, value, text) {
  const at = 100 * Math.min(1, Math.max(0, value));
  return place(el("span", { class: `act-mark ${kind}${at > 80 ? " late" : ""}`, title: `${text}: ${fixed(value)}`, aria: { hidden: true } }, el("i", { text })), { at });
}

/** How well the feature alone finds each domain. */
export function detectionTable(record, own, domains) {
  const rows = domains.filter((domain) => `auroc_${domain}` in record.scores).map((domain) => {
    const score = (name) => record.scores[name.replace("#", domain)];
    const value = score("auroc_#");
    return {
      name: domain, kind: hue(domain), own: own.includes(domain), value,
      low: score("auroc_#_low"), high: score("auroc_#_high"), none: score("auroc_#_null"),
      cells: [fixed(value), interval(score("auroc_#_low"), score("auroc_#_high")), fixed(score("auroc_#_null")),
        fixed(score("selectivity_#")), percent(score("tpr_#"), 0), percent(score("lookalike_fpr_#"), 0)],
      titles: { 3: score("selectivity_#_low") === undefined ? null : `At least ${fixed(score("selectivity_#_low"))}, with 95 % confidence` },
    };
  });
  return rows.length === 0 ? null : scoreTable("Detection by domain", "Domain", AUROC, rows, [
    ["AUROC", "Of the feature alone, on texts that it was not chosen on"], ["95 %", "Interval"], ["null", "The same with the labels shuffled"],
    ["selectivity", "AUROC against texts of other domains alone"],
    ["finds", "Share of the domain's texts above the value that one in twenty of the other texts exceeds"],
    ["look-alikes", "Share of the texts that only look like the domain above that value"]]);
}

/** How well the explanation predicts where the feature fires. */
export function fidelityTable(record) {
  const rows = record.fidelity.map((score) => ({
    name: score.level, kind: "", own: true, value: score.corr, low: score.corr_low, high: score.corr_high, none: score.corr_null,
    cells: [fixed(score.corr), interval(score.corr_low, score.corr_high), fixed(score.corr_null)],
    note: [`${whole(score.n)} ${score.level}s, simulator ${score.simulator}`, score.missing ? `${whole(score.missing)} without an answer` : null,
      given("AUROC", score.auroc), given("balanced accuracy", score.balanced_accuracy), given("PR-AUC", score.pr_auc)].filter(Boolean).join(", "),
  }));
  return rows.length === 0 ? null : scoreTable("Fidelity of the explanation", "Level", CORRELATION, rows, [
    ["CorrScore", "Pearson's correlation of predicted and true activation, on unseen text"], ["95 %", "Interval, by resampling documents"],
    ["null", "97.5th percentile of the same with the explanations of other features"]]);
}

function given(name, value) {
  return value === null || value === undefined ? null : `${name} ${fixed(value)}`;
}

/** What ablating the feature does to the domains' scores. */
export function causalityTable(record, own, domains) {
  const found = record.causality;
  if (!found) return null;
  const shown = domains.filter((domain) => domain in found.effects);
  const largest = Math.max(...shown.flatMap((domain) => [found.effects[domain], found.low[domain] ?? 0, found.high[domain] ?? 0].map(Math.abs)));
  const reach = REACHES.find((one) => one >= largest) ?? largest;
  const rows = shown.map((domain) => ({
    name: domain, kind: hue(domain), own: own.includes(domain), value: found.effects[domain], low: found.low[domain], high: found.high[domain],
    cells: [signed(found.effects[domain]), interval(found.low[domain], found.high[domain])],
  }));
  return scoreTable("Effect of ablation on the domains' logits", "Domain", { low: -reach, high: reach, zero: 0, ticks: [-reach, 0, reach] }, rows,
    [["logit", "Mean change if the feature is ablated; negative: the score falls"], ["95 %", "Interval of the mean"]]);
}

function scoreTable(caption, first, axis, rows, columns) {
  return tableBox("scores", caption,
    el("thead", {}, el("tr", {},
      el("th", { text: first, attrs: { scope: "col" } }),
      el("td", { class: "track-cell", aria: { hidden: true } }, el("div", { class: "scale" }, axis.ticks.map((tick) => place(el("span", { text: String(tick).replace("-", "−") }), { at: at(axis, tick) })))),
      columns.map(([name, title]) => el("th", { class: "num", text: name, title, attrs: { scope: "col" } })))),
    el("tbody", {}, rows.map((row) => [
      el("tr", { class: `${row.kind}${row.own ? " own" : ""}${row.note ? " noted" : ""}` },
        el("th", { attrs: { scope: "row" } }, row.kind ? el("span", { class: "swatch", aria: { hidden: true } }) : null, el("bdi", { text: row.name }),
          row.own && row.kind ? el("span", { class: "sr", text: " (its own)" }) : null),
        el("td", { class: "track-cell", aria: { hidden: true } }, track(axis, row)),
        row.cells.map((text, index) => el("td", { class: "num", text, title: row.titles?.[index] }))),
      row.note ? el("tr", { class: "note" }, el("td", { class: "soft", text: row.note, attrs: { colspan: 2 + columns.length } })) : null,
    ])));
}

/** A table that scrolls sideways where it is too wide; on narrow screens, where that may be, by the keyboard too. */
export function tableBox(kind, caption, ...parts) {
  const narrow = matchMedia("(max-width: 62rem)").matches;
  return el("div", { class: "table-box", aria: { label: caption }, attrs: { role: "group", tabindex: narrow ? 0 : null } },
    el("table", { class: kind }, el("caption", { class: "sr", text: caption }), parts));
}

function at(axis, value) {
  return 100 * Math.min(1, Math.max(0, (value - axis.low) / (axis.high - axis.low)));
}

/** A value (a point), its interval (a line), its null (a tick) and where chance or no effect lies (the rail's notch). */
function track(axis, { value, low, high, none }) {
  return el("div", { class: "track" },
    place(el("i", { class: "zero" }), { at: at(axis, axis.zero) }),
    none === undefined || none === null ? null : place(el("i", { class: "none" }), { at: at(axis, none) }),
    interval(low, high) ? place(el("i", { class: "span" }), { at: at(axis, low), to: at(axis, high) }) : null,
    place(el("i", { class: "point" }), { at: at(axis, value) }));
}

/** The terms of the executable explanation, strongest first, each with what it adds to the log-odds. */
export function predicateTable(predicate, name) {
  const terms = [...predicate.terms].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  const largest = Math.max(...terms.map((term) => Math.abs(term.weight)), 0) || 1;
  return tableBox("terms", "Terms of the executable explanation",
    el("thead", {}, el("tr", {}, ["Term", "Kind"].map((text) => el("th", { text, attrs: { scope: "col" } })), el("th", { class: "num", text: "Weight", attrs: { scope: "col" } }), el("td", { aria: { hidden: true } }))),
    el("tbody", {},
      terms.map((term) => el("tr", {},
        el("th", { class: "mono", attrs: { scope: "row" } }, el("bdi", { text: name(term.text) })), el("td", { class: "soft", text: term.kind }), el("td", { class: "num", text: signed(term.weight) }),
        el("td", { class: "bar-cell", aria: { hidden: true } }, place(el("span", { class: `bar${term.weight < 0 ? " less" : ""}` }), { w: `${50 * Math.abs(term.weight) / largest}%` })))),
      el("tr", { class: "soft" }, el("th", { text: "bias", attrs: { scope: "row" } }), el("td"), el("td", { class: "num", text: signed(predicate.bias) }), el("td"))));
}
