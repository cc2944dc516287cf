// The card of one feature: all that the bank and its reviewers say of it.

import { activationChart, causalityTable, detectionTable, fidelityTable, predicateTable, tableBox } from "./card_charts.js";
import { button, el, toast } from "./dom.js";
import { excerpts, readable, tokenText } from "./card_text.js";
import { fixed, hue, moment, percent, whole } from "./format.js";

const CONCEPTS = 6;
const METHODS = { executable: "an executable explanation, fitted to its activations", llm: "a language model", imported: "the collection that it was imported from", reviewer: "a reviewer" };

/** The address of a feature's card. */
export function cardLink(id) {
  return `#/explorer?${new URLSearchParams({ feature: id })}`;
}

/** How often a feature fires, in words. */
export function rarity(density) {
  return density > 0 ? `1 token in ${whole(Math.max(1, 1 / density))}` : "never";
}

/**
 * The card of `detail`, an answer of `GET /v1/features/{id}`. domains: the order in which they are shown. onFeature: called with
 * the id of a near-duplicate that is followed, in place of going to its address.
 */
export function makeCard(detail, { domains, onFeature }) {
  const { feature, effective, reviews } = detail;
  const main = bestDomain(feature, effective.domains);
  return el("article", { class: `card ${main ? hue(main) : "d-none"}`, aria: { label: `Feature ${feature.id}` }, data: { card: feature.id, status: effective.status } },
    header(feature, effective),
    facts(feature, main),
    el("div", { class: "card-grid" },
      section("Where it fires", "evidence", excerpts(feature)),
      section("Activation", "activation", activationChart(feature)),
      section("Detection", "detection wide", detectionTable(feature, effective.domains, domains), "Of the feature alone: point, 95 % interval and, as a tick, what shuffled labels give."),
      section("Fidelity", "fidelity", fidelityTable(feature), "How well the explanation foretells where it fires; the tick is what other features' explanations reach."),
      section("Causality", "causality", causalityTable(feature, effective.domains, domains), feature.causality ? `Change of the scores if it is ablated, on ${whole(feature.causality.texts)} texts.` : null),
      section("Part in the heads", "heads", headParts(detail.heads, domains), "What it adds to a domain's logit for each unit of averaged activation, and whether it steers the domain."),
      section("Predicate", "predicate", feature.predicate ? predicateTable(feature.predicate, tokenText) : null),
      section("Contrast pairs told apart", "concepts", pairs(feature.concept_scores)),
      section("Trigger tokens", "triggers", terms(feature.trigger_tokens)),
      section("Words around", "ngrams", terms(feature.ngrams)),
      section("Promotes", "promotes", chips(feature.promoted_tokens.map((text) => ({ text: tokenText(text) }))), "Tokens whose logits it raises most."),
      section("Near-duplicates", "duplicates", duplicates(feature.duplicates, onFeature)),
      section("Reviews", "reviews wide", history(reviews) ?? el("p", { class: "soft", text: "Nobody has reviewed it yet." }))));
}

/** Its weights in the domains' heads; a feature that no head holds tells the guard nothing. */
function headParts(heads, domains) {
  const held = domains.filter((domain) => domain in heads);
  if (held.length === 0) return el("p", { class: "soft", text: "No head holds it: it explains, and decides nothing." });
  return tableBox("scores", "Part in the domains' heads",
    el("thead", {}, el("tr", {}, el("th", { text: "Domain", attrs: { scope: "col" } }), el("th", { class: "num", text: "weight", attrs: { scope: "col" } }), el("th", { text: "steers", attrs: { scope: "col" } }))),
    el("tbody", {}, held.map((domain) => el("tr", { class: hue(domain) },
      el("th", { attrs: { scope: "row" } }, el("span", { class: "swatch", aria: { hidden: true } }), el("bdi", { text: domain })),
      el("td", { class: "num", text: fixed(heads[domain].weight) }),
      el("td", { text: heads[domain].steering > 0 ? "yes" : "–" })))));
}

function bestDomain(feature, own) {
  const score = (domain) => feature.scores[`auroc_${domain}`] ?? 0;
  return [...own].sort((a, b) => score(b) - score(a))[0] ?? null;
}

function section(title, name, content, note) {
  if (!content || (Array.isArray(content) && content.length === 0)) return null;
  return el("section", { class: `block b-${name}`, data: { block: name.split(" ")[0] } },
    el("h3", { text: title }), note ? el("p", { class: "soft block-note", text: note }) : null, content);
}

// ---- head --------------------------------------------------------------------------------------------------

function header(feature, effective) {
  return el("header", { class: "card-head" },
    el("div", { class: "card-title" },
      el("h2", { class: "mono", text: feature.id, attrs: { tabindex: -1 } }),
      el("span", { class: "soft", title: feature.hook_name }, `layer ${feature.layer}, `, el("bdi", { class: "mono", text: feature.hook_name })),
      el("div", { class: "card-links" },
        el("a", { class: "btn small", text: "Pin in playground", attrs: { href: `#/playground?${new URLSearchParams({ pin: feature.id })}` } }),
        el("a", { class: "btn small", text: "Steer with it", attrs: { href: `#/playground?${new URLSearchParams({ steer: feature.id })}` } }),
        button("Copy id", () => copy(feature.id), { class: "btn small ghost" }))),
    el("div", { class: "card-badges" }, badges(feature, effective)),
    el("p", { class: "card-explanation", text: readable(effective.explanation), attrs: { dir: "auto" } }),
    effective.concepts.length ? el("ul", { class: "chips", aria: { label: "Concepts" } }, effective.concepts.map((name) => el("li", { class: "chip" }, el("bdi", { text: name })))) : null,
    author(feature, effective),
    feature.refusals.length ? el("div", { class: "callout warn" }, el("b", { text: "Rules that it fails" }), el("ul", { class: "plain" }, feature.refusals.map((rule) => el("li", { text: rule, attrs: { dir: "auto" } })))) : null);
}

function badges(feature, effective) {
  const lexicality = feature.lexicality === null ? null : `${percent(feature.lexicality, 0)} of the activation's variance is explained by the token alone`;
  const status = { accepted: "good", rejected: "bad" }[effective.status];
  return [
    effective.domains.map((domain) => el("span", { class: `badge ${hue(domain)}`, text: domain })),
    effective.domains.length === 0 ? el("span", { class: "badge", text: "no domain" }) : null,
    feature.direction ? el("span", { class: "badge", title: "A direction fitted to labels, not a feature of the SAE" }, "direction of ", el("bdi", { text: feature.direction })) : null,
    feature.kind ? el("span", { class: "badge", title: lexicality }, feature.kind, feature.lexicality === null ? null : el("span", { class: "soft", text: fixed(feature.lexicality) })) : null,
    el("span", { class: `badge ${feature.admitted ? "good" : "warn"}`, text: feature.admitted ? "admitted" : "not admitted" }),
    status ? el("span", { class: `badge ${status}`, text: `${effective.status === "accepted" ? "✓" : "✕"} ${effective.status}`, data: { verdict: effective.status } })
      : el("span", { class: "badge", text: "unreviewed", data: { verdict: "unreviewed" } }),
  ];
}

function author(feature, effective) {
  const changed = ["domains", "concepts", "explanation"].filter((name) => JSON.stringify(feature[name]) !== JSON.stringify(effective[name]));
  const found = feature.explainer;
  const machine = found ? [METHODS[found.method] ?? found.method, found.model, found.seed === null ? null : `seed ${found.seed}`].filter(Boolean).join(", ") : "an unnamed author";
  if (changed.length === 0) return el("p", { class: "soft small", text: `Explained by ${machine}.` });
  return el("details", { class: "machine", attrs: { open: true } },
    el("summary", {}, `Changed by review: ${changed.join(", ")}. The machine's label`),
    el("dl", { class: "facts" },
      el("dt", { text: "domains" }), el("dd", { text: feature.domains.join(", ") || "none" }),
      el("dt", { text: "concepts" }), el("dd", {}, el("bdi", { text: feature.concepts.join(", ") || "none" })),
      el("dt", { text: "explanation" }), el("dd", { text: readable(feature.explanation), attrs: { dir: "auto" } }),
      el("dt", { text: "by" }), el("dd", {}, el("bdi", { text: machine }))));
}

function facts(feature, main) {
  const corr = (feature.fidelity.find((score) => score.level === "segment") ?? feature.fidelity[0])?.corr;
  const auroc = main === null ? undefined : feature.scores[`auroc_${main}`];
  const items = [
    ["AUROC", fixed(auroc), main ?? "no domain of its own"],
    ["Fidelity", fixed(corr), "correlation, segments"],
    ["Fires on", rarity(feature.density), percent(feature.density, feature.density < 0.001 ? 3 : 2)],
    ["Threshold", fixed(feature.threshold / feature.scale), `${fixed(feature.threshold)} of scale ${fixed(feature.scale)}`],
  ];
  return el("dl", { class: "figures" }, items.map(([name, value, note]) => el("div", {}, el("dt", { text: name }), el("dd", {}, el("b", { text: value }), el("span", { class: "soft", text: note })))));
}

async function copy(id) {
  try {
    await navigator.clipboard.writeText(id);
    toast(`Copied ${id}.`, "ok");
  } catch {
    toast(`The browser does not allow copying here. The id is ${id}.`, "error");
  }
}

// ---- lists -------------------------------------------------------------------------------------------------

function terms(found) {
  return chips(found.map((term) => ({ text: tokenText(term.text), title: `z ${fixed(term.z, 1)}, ${whole(term.documents)} documents`, note: fixed(term.z, 0) })));
}

function chips(items) {
  return items.length === 0 ? null : el("ul", { class: "chips" }, items.map(({ text, title, note }) => el("li", { class: "chip mono", title },
    el("bdi", { text }), note ? el("span", { class: "soft" }, el("span", { class: "sr", text: "z " }), note) : null)));
}

function pairs(scores) {
  if (scores.length === 0) return null;
  const columns = [["share", "Pairs where it fires on the text with the concept and not on its twin"], ["reversed", "Pairs where it is the other way round"], ["pairs", null], ["q", "p-value, adjusted for all features and concepts (Benjamini-Hochberg)"]];
  return [tableBox("pairs", "Concepts whose contrast pairs it tells apart",
    el("thead", {}, el("tr", {}, el("th", { text: "Concept", attrs: { scope: "col" } }), columns.map(([text, title]) => el("th", { class: "num", text, title, attrs: { scope: "col" } })))),
    el("tbody", {}, scores.slice(0, CONCEPTS).map((score) => el("tr", {}, el("th", { attrs: { scope: "row" } }, el("bdi", { text: score.concept })),
      [percent(score.frequency, 0), percent(score.reverse, 0), whole(score.pairs), score.q < 0.001 ? score.q.toExponential(0).replace("-", "−") : fixed(score.q, 3)].map((text) => el("td", { class: "num", text })))))),
  scores.length > CONCEPTS ? el("p", { class: "soft small", text: `and ${scores.length - CONCEPTS} more` }) : null];
}

function duplicates(found, onFeature) {
  if (found.length === 0) return null;
  const follow = (event, id) => {
    if (!onFeature || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    onFeature(id);
  };
  return el("ul", { class: "chips" }, found.map((other) => el("li", { class: "chip duplicate" },
    el("a", { class: "mono", text: other.id, attrs: { href: cardLink(other.id) }, on: { click: (event) => follow(event, other.id) } }),
    el("span", { class: "soft", text: `r ${fixed(other.correlation)}` }))));
}

function history(reviews) {
  if (reviews.length === 0) return null;
  return el("ol", { class: "reviews" }, [...reviews].reverse().map((review) => {
    const changes = review.overrides ?? {};
    const sign = { accept: "good", reject: "bad", relabel: "good" }[review.verdict] ?? "";
    return el("li", { data: { review: review.verdict } },
      el("div", { class: "row" }, el("span", { class: `badge ${sign}`, text: review.verdict }), el("b", {}, el("bdi", { text: review.reviewer })),
        el("time", { class: "soft", text: moment(review.time), attrs: { datetime: review.time } }), el("span", { class: "soft", title: "Version of the bank" }, "bank ", el("bdi", { text: review.bank }))),
      review.reason ? el("p", { text: readable(review.reason), attrs: { dir: "auto" } }) : null,
      changes.domains ? el("p", { class: "soft", text: `domains: ${changes.domains.join(", ") || "none"}` }) : null,
      changes.concepts ? el("p", { class: "soft" }, "concepts: ", el("bdi", { text: changes.concepts.join(", ") || "none" })) : null,
      changes.explanation ? el("p", { class: "soft" }, "explanation: ", el("bdi", { text: readable(changes.explanation) })) : null);
  }));
}
