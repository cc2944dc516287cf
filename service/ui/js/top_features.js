// The features that verdicts name most often: those that the audit counts, and those of the events seen since.

import { about } from "./app.js";
import { catalogue } from "./catalogue.js";
import { setShare, shareBar } from "./charts.js";
import { el, replace } from "./dom.js";
import { featureLink } from "./event_detail.js";
import { hue, percent, whole } from "./format.js";

const SHOWN = 10;

/** {element, count(event), setHistory(features, verdicts, until), draw(since)}: the panel of the top features. */
export function topFeatures() {
  let base = new Map(); // id → {count, explanation}
  let verdicts = 0;
  let until = -Infinity;
  let fresh = []; // {time, domain, features} since then
  let byId = new Map();
  const lines = new Map(); // id → {item, parts}
  const list = el("ol", { class: "top-features", aria: { label: "Features by the number of verdicts that name them" } });
  const source = el("p", { class: "soft top-source" });
  const element = el("section", { class: "panel", aria: { label: "Features that fire most" } },
    el("header", {}, el("h2", { text: "Features that fire most" })), el("div", { class: "body" }, list, source));
  catalogue(about.bank.version).then((found) => { byId = found.byId; }, () => {}); // only the domains' colours come from it

  function count(event, time) {
    if (time < until) return;
    fresh.push({ time, domain: event.domain, features: event.features });
    if (fresh.length > 5000) fresh.shift();
  }

  function setHistory(features, all, end) {
    base = new Map(features.map((one) => [one.id, one]));
    verdicts = all;
    until = end;
    fresh = fresh.filter((one) => one.time >= until);
  }

  function ranked() {
    const found = new Map([...base].map(([id, one]) => [id, { id, count: one.count, explanation: one.explanation, domains: new Set() }]));
    for (const { domain, features } of fresh) {
      for (const hit of features) {
        let one = found.get(hit.id);
        if (one === undefined) found.set(hit.id, one = { id: hit.id, count: 0, explanation: hit.explanation, domains: new Set() });
        one.count += 1;
        if (domain) one.domains.add(domain);
      }
    }
    return [...found.values()].sort((one, other) => other.count - one.count || (one.id < other.id ? -1 : 1)).slice(0, SHOWN);
  }

  function draw(since) {
    const top = ranked();
    const all = verdicts + fresh.length;
    // Nothing moves under a pointer or the focus: only the numbers change then.
    const still = list.matches(":hover") || list.contains(document.activeElement);
    const known = top.every((one) => lines.has(one.id)) && lines.size === top.length;
    if (!(still && known)) {
      if (still && lines.size > 0) return;
      for (const id of [...lines.keys()]) if (!top.some((one) => one.id === id)) lines.delete(id);
      replace(list, top.map((one) => {
        if (!lines.has(one.id)) lines.set(one.id, line(one));
        return lines.get(one.id).item;
      }));
    }
    for (const one of top) fill(lines.get(one.id), one, all, top[0].count);
    source.textContent = top.length === 0 ? `No feature was named in a verdict, ${since}.` : `Verdicts that name it and their share of all, ${since}.`;
  }

  function fill({ item, number, share, bar, badges }, one, all, most) {
    number.textContent = whole(one.count);
    share.textContent = all > 0 ? percent(Math.min(1, one.count / all), 0) : "";
    setShare(bar, one.count / most);
    const domains = byId.get(one.id)?.domains ?? [...one.domains];
    if (item.dataset.domains === domains.join(" ")) return;
    item.dataset.domains = domains.join(" ");
    item.classList.add(hue(domains[0]));
    replace(badges, domains.map((domain) => el("span", { class: `badge ${hue(domain)}`, text: domain })));
  }

  return { element, count, setHistory, draw };
}

function line(one) {
  const number = el("strong", {});
  const share = el("small", {});
  const bar = shareBar(0);
  const badges = el("span", { class: "row" });
  const item = el("li", { data: { feature: one.id } },
    el("a", { class: "name", attrs: { href: featureLink(one.id), dir: "auto" }, text: one.explanation || one.id }), el("span", { class: "num" }, number, share), bar,
    el("span", { class: "row under" }, el("span", { class: "mono soft", text: one.id }), badges));
  return { item, number, share, bar, badges };
}
