// What the guard decided, where it decided it, and how a run ended.

import { button, el } from "../dom.js";
import { fixed, hue, whole } from "../format.js";

const KINDS = { allow: "good", flag: "warn", steer: "warn", block: "bad" };
const FINISHES = { stop: "Ended by itself", length: "Cut at the token limit", content_filter: "Stopped by the guard" };

/** An action as a badge. */
export function actionBadge(action) {
  return el("span", { class: `badge ${KINDS[action] ?? ""}`, text: action });
}

/** The mark of a verdict inside the text; it opens into the reasons. explain(id): a feature's explanation, or null. */
export function verdictMark(verdict, { explain, open = false }) {
  const card = verdictCard(verdict, explain);
  card.hidden = !open;
  const target = verdict.domain || verdict.rule;
  const mark = button("", () => {
    card.hidden = !card.hidden;
    mark.setAttribute("aria-expanded", String(!card.hidden));
  }, { class: "verdict-mark", aria: { expanded: open, label: `Verdict: ${verdict.action}, ${target}, ${fixed(verdict.score)} against ${fixed(verdict.threshold)}. Reasons` } });
  mark.append(el("span", { text: verdict.action }), el("bdi", { text: target }), el("span", { class: "num", text: fixed(verdict.score) }));
  return el("div", { class: `verdict ${KINDS[verdict.action] ?? ""}`, attrs: { dir: "ltr" }, data: { action: verdict.action, domain: verdict.domain } }, mark, card);
}

function verdictCard(verdict, explain) {
  const features = verdict.features ?? [];
  return el("div", { class: "verdict-card" },
    el("dl", { class: "facts" },
      el("dt", { text: "Action" }), el("dd", {}, actionBadge(verdict.action)),
      el("dt", { text: "Rule" }), el("dd", {}, el("bdi", { text: verdict.rule })),
      el("dt", { text: "Score" }), el("dd", { text: `${fixed(verdict.score, 3)} against ${fixed(verdict.threshold, 3)}` }),
      el("dt", { text: "Token" }), el("dd", { text: `${verdict.token_index} of the ${verdict.phase === "prompt" ? "prompt" : "answer"}` })),
    features.length === 0 ? null : el("p", { class: "soft", text: "Features that brought it about" }),
    el("ul", { class: "pg-causes" }, features.map((feature) => el("li", {},
      el("a", { class: "mono", text: feature.id, attrs: { href: `#/explorer?feature=${encodeURIComponent(feature.id)}` } }),
      el("span", { class: "pg-clamp", text: feature.explanation || explain(feature.id) || "", attrs: { dir: "auto" } }),
      el("span", { class: "num", text: fixed(feature.activation), title: "Activation; 1 is its 99.9th percentile" })))));
}

/** How a run ended. seconds: that the answer took. */
export function runEnd(run, { domains, limits, mode, seconds }) {
  const { end } = run;
  const phase = Object.keys(end.response_scores ?? {}).length > 0 ? "response" : "prompt";
  const scores = phase === "response" ? end.response_scores : end.prompt_scores ?? {};
  const counts = mode === "chat"
    ? `${whole(end.tokens?.prompt)} + ${whole(end.tokens?.response)} tokens`
    : `${whole((end.tokens?.prompt ?? 0) + (end.tokens?.response ?? 0))} tokens`;
  const pace = mode === "chat" && seconds > 0 && end.tokens?.response > 1 ? `${fixed(end.tokens.response / seconds, 1)} a second` : null;
  return el("div", { class: "pg-end", data: { run: run.name, action: end.action, finish: end.finish_reason } },
    end.refusal ? el("p", { class: "callout error pg-refusal", text: end.refusal, attrs: { dir: "auto" } }) : null,
    el("div", { class: "pg-end-line" },
      actionBadge(end.action),
      el("span", { class: "soft", text: [mode === "chat" ? FINISHES[end.finish_reason] ?? end.finish_reason : "Read to the end", counts, pace].filter(Boolean).join("  ·  ") }),
      end.truncated ? el("span", { class: "badge warn", text: "cut to the greatest length" }) : null),
    el("ul", { class: "pg-scores", aria: { label: phase === "response" ? "Scores of the answer" : "Scores of the prompt" } },
      domains.filter((domain) => domain in scores).map((domain) => {
        const limit = limits.of(domain, phase);
        const over = limit !== null && scores[domain] >= limit;
        return el("li", { class: `${hue(domain)} ${over ? "over" : ""}` },
          el("span", { text: domain }),
          el("b", { class: "num", text: fixed(scores[domain]) }),
          limit === null ? null : el("span", { class: "soft", text: over ? `≥ ${fixed(limit)}` : `of ${fixed(limit)}` }));
      })));
}
