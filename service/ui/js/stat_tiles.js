// The numbers above the monitor: what /v1/stats counts, how fast it grows, and what of it is an alarm.

import { announce, el, replace, svg } from "./dom.js";
import { fixed, percent, whole } from "./format.js";

const WINDOW = 60; // seconds over which "now" is measured
const SOON = 4; // seconds before a rate is told at all

const TILES = [
  ["judged", "Judged"], ["flagged", "Flagged"], ["blocked", "Blocked"], ["coverage", "Coverage"],
  ["guard", "Guard’s own time"], ["errors", "Internal errors"], ["load", "In flight / queued"], ["versions", "In use"],
];

/** {element, show(stats, own), stale()}: tiles for what /v1/stats says. own: requests in flight that are this page's. */
export function statTiles() {
  const tiles = new Map(TILES.map(([name, label]) => [name, tile(name, label)]));
  const element = el("dl", { class: "tiles stat-tiles", aria: { label: "Counts since the server started" } }, [...tiles.values()].map((one) => one.box));
  const samples = [];
  const alarms = new Set();

  function show(stats, own) {
    const now = { time: stats.time, ...results(stats.requests) };
    // Counters that fell: the server was started anew.
    if (samples.length > 0 && now.judged < samples.at(-1).judged) samples.length = 0;
    samples.push(now);
    while (samples.length > 2 && samples[1].time < stats.time - WINDOW) samples.shift();
    const rate = (name) => perMinute(samples[0], now, name);
    put("judged", whole(now.judged), `${rate("judged")}\n${counted(now.prompt, "prompt")}, ${counted(now.response, "answer")}`);
    put("flagged", whole(now.flag), `${rate("flag")}\n${shareOf(now.flag, now.judged)} of all${now.steer ? `, ${whole(now.steer)} steered` : ""}`);
    put("blocked", whole(now.block), `${rate("block")}\n${shareOf(now.block, now.judged)} of all`);
    put("coverage", coverage(stats.coverage), stats.coverage === null ? "no token generated yet" : `${whole(stats.tokens.observed)} of\n${whole(stats.tokens.generated)} tokens`);
    const { share, mean_ms: mean } = stats.guard;
    if (share === null) put("guard", mean === null ? "–" : `${fixed(mean)} ms`, mean === null ? "nothing measured yet" : "a token (a pass of the model)");
    else put("guard", percent(share), `${fixed(mean)} ms a token`);
    put("errors", whole(stats.errors), stats.errors > 0 ? "the guard failed; on_error decided" : "none since the start");
    put("load", `${whole(Math.max(0, stats.in_flight - own))} / ${whole(stats.queued)}`, "requests, without this page’s");
    replace(tiles.get("versions").value, line("Bank", stats.bank), line("Policy", stats.policy));
    alarm("coverage", stats.coverage !== null && stats.coverage !== 1, `Coverage is ${coverage(stats.coverage)}: not every generated token was observed.`);
    alarm("errors", stats.errors > 0, `The guard has had ${counted(stats.errors, "internal error")}.`);
    element.classList.remove("stale");
  }

  function put(name, value, note) {
    const { value: place, note: below } = tiles.get(name);
    if (place.textContent !== value) place.textContent = value;
    if (below.textContent !== note) below.textContent = note;
  }

  function alarm(name, on, words) {
    const { box, mark } = tiles.get(name);
    box.classList.toggle("alarm", on);
    mark.hidden = !on;
    if (on && !alarms.has(name)) announce(words);
    if (on) alarms.add(name);
    else alarms.delete(name);
  }

  return { element, show, stale: () => element.classList.add("stale") };
}

function tile(name, label) {
  const mark = el("span", { class: "alarm-mark", attrs: { hidden: true } },
    svg("svg", { attrs: { viewBox: "0 0 16 16", width: 18, height: 18 }, aria: { hidden: true } },
      svg("path", { attrs: { d: "M8 1.6 15.3 14.2H.7Z", fill: "currentColor" } }), svg("path", { class: "bang", attrs: { d: "M8 6v4.2M8 11.4v1.4", "stroke-width": 1.6 } })),
    el("span", { class: "sr", text: " alarm" }));
  const value = el("dd", { class: "value", text: "–" });
  const note = el("dd", { class: "note" });
  return { box: el("div", { class: "tile", data: { tile: name } }, el("dt", {}, el("span", { text: label }), mark), value, note), value, note, mark };
}

function line(label, version) {
  return el("span", { class: "version", title: version }, el("span", { class: "soft", text: label }), el("bdi", { class: "mono", text: version }));
}

/** Judged texts by what became of them. */
function results(requests) {
  const sum = { judged: 0, prompt: 0, response: 0, flag: 0, steer: 0, block: 0 };
  for (const [phase, counts] of Object.entries(requests)) {
    for (const [result, n] of Object.entries(counts)) {
      sum.judged += n;
      if (phase in sum) sum[phase] += n;
      if (["flag", "steer", "block"].includes(result)) sum[result] += n;
    }
  }
  return sum;
}

function perMinute(first, last, name) {
  const seconds = last.time - first.time;
  return seconds < SOON ? "… / min" : `${whole((60 * (last[name] - first[name])) / seconds)} / min`;
}

function counted(n, what) {
  return `${whole(n)} ${what}${n === 1 ? "" : "s"}`;
}

function shareOf(part, all) {
  return all > 0 ? percent(part / all) : "–";
}

/** Never rounded up to 100 %: one token that was missed has to be seen. */
function coverage(value) {
  if (value === null) return "–";
  if (value === 1) return "100 %";
  const shown = value < 1 ? Math.min(99.99, Math.floor(value * 1e4) / 100) : Math.ceil(value * 1e4) / 100;
  return `${shown.toFixed(2)} %`;
}
