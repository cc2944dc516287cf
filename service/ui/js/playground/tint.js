// What the colour of a token says: how near a score is to the policy's threshold, or how active a feature is.

import { el } from "../dom.js";
import { fixed, hue } from "../format.js";
import { activation, split } from "./runs.js";

/** The policy's thresholds: `of(domain, phase)` is the lowest of those that apply, or null; `tokens` how many must agree. */
export function limitsOf(about, mode) {
  const rules = about.policy?.rules ?? [];
  // An answer is judged while it comes, a text as a whole; the policy may have a threshold for each.
  const kind = (phase) => (mode === "chat" && phase === "response" ? "stream" : "text");
  const bound = (domain, phase) => rules
    .filter((rule) => rule.target === domain && rule.scope.includes(phase))
    .map((rule) => ({ limit: rule.thresholds[kind(phase)] ?? rule.thresholds.text ?? rule.thresholds.stream ?? null, tokens: rule.evidence_tokens }))
    .filter((rule) => rule.limit !== null)
    .sort((a, b) => a.limit - b.limit)[0];
  return {
    of: (domain, phase) => bound(domain, phase)?.limit ?? null,
    tokens: (domain, phase) => bound(domain, phase)?.tokens ?? 1,
  };
}

/** The domain with the highest score, but one that has reached its threshold goes before one that has not. */
export function leading(cell, domains, limits) {
  let best = null;
  for (const [i, domain] of domains.entries()) {
    const value = cell.s[i];
    if (value === undefined) continue;
    const limit = limits.of(domain, cell.phase);
    const over = limit !== null && value >= limit;
    if (best === null || (over && !best.over) || (over === best.over && value > best.value)) best = { domain, value, limit, over };
  }
  return best;
}

/** {hue, level, label, value, limit}: the tint of a cell. Level 4 is at or above what counts, 0 is none. tint: `lead`, `domain:NAME`, `feature:ID`. */
export function shade(cell, tint, domains, limits, pins) {
  const [kind, name] = tint === "lead" ? ["lead", ""] : split(tint);
  if (kind === "feature") {
    const value = activation(cell, name);
    return { hue: `p${Math.max(0, pins.indexOf(name))}`, label: name, value, limit: 1, level: levelOf(value, 1) };
  }
  const found = kind === "lead" ? leading(cell, domains, limits) : of(cell, name, domains, limits);
  if (found === null) return { hue: "d-other", label: "", value: null, limit: null, level: 0 };
  return { hue: hue(found.domain), label: found.domain, value: found.value, limit: found.limit, level: levelOf(found.value, found.limit) };
}

/** A shade in words. */
export function inWords({ label, value, limit, level }) {
  if (value === null || value === undefined) return "not scored";
  const said = `${label} ${fixed(value)}`;
  if (limit === null) return said;
  return level === 4 ? `${said}, at or above ${fixed(limit)}` : `${said} of ${fixed(limit)}`;
}

/** What the tints mean. */
export function legend(tint, domains) {
  const [kind, name] = tint === "lead" ? ["lead", ""] : split(tint);
  const whole = kind === "feature" ? "its 99.9th percentile" : "the threshold";
  const sample = kind === "lead" ? "d-other" : kind === "domain" ? hue(name) : "p-sample";
  const steps = [["l1", "25"], ["l2", "50"], ["l3", "75 %"]];
  return el("div", { class: "pg-legend", attrs: { role: "group" }, aria: { label: "Legend" } },
    kind === "lead" ? el("span", { class: "pg-legend-domains" }, domains.map((domain) => el("span", { class: `pg-key ${hue(domain)}`, text: domain }))) : null,
    el("span", { class: "pg-legend-steps" },
      steps.map(([level, text]) => el("span", { class: `pg-step ${level} ${sample}`, text, title: `from ${parseInt(text, 10)} % of ${whole}` })),
      el("span", { class: `pg-step l4 over ${sample}`, text: kind === "feature" ? "99.9th percentile" : "threshold", title: `at or above ${whole}` })));
}

function of(cell, domain, domains, limits) {
  const value = cell.s[domains.indexOf(domain)];
  return value === undefined ? null : { domain, value, limit: limits.of(domain, cell.phase) };
}

function levelOf(value, limit) {
  const share = value / (limit ?? 1);
  if (limit !== null && share >= 1) return 4;
  return Math.min(3, Math.floor(4 * share));
}
