// What stands under a verdict of the stream: all of its features, where it came from, and the way to its trace.

import { get } from "./api.js";
import { about } from "./app.js";
import { shareBar } from "./charts.js";
import { button, el, unique } from "./dom.js";
import { markBar } from "./event_marks.js";
import { fixed, hue, moment } from "./format.js";

const HANDOVER = "sailguard-handover";

/** Address of a feature's card. */
export function featureLink(id) {
  return `#/explorer?feature=${encodeURIComponent(id)}`;
}

/** Table of the features that a verdict names: {id, layer, explanation, activation, contribution}. */
export function hitsTable(features, domain) {
  if (features.length === 0) return el("p", { class: "soft", text: "It names no features." });
  const most = Math.max(...features.map((hit) => hit.contribution ?? 0), 1e-9);
  return el("div", { class: "table-box" }, el("table", { class: `hits ${hue(domain)}` },
    el("thead", {}, el("tr", {}, el("th", { text: "Feature", attrs: { scope: "col" } }),
      ["Activation", "Contribution"].map((text) => el("th", { class: "num", text, attrs: { scope: "col" } })))),
    el("tbody", {}, features.map((hit) => el("tr", {},
      el("th", { attrs: { scope: "row" } }, el("div", { class: "hit" }, el("a", { class: "mono", text: hit.id, attrs: { href: featureLink(hit.id) } }),
        el("span", { text: hit.explanation || "no explanation", class: hit.explanation ? "" : "soft", attrs: { dir: "auto" } }))),
      el("td", { class: "num", text: fixed(hit.activation) }),
      el("td", { class: "num" }, fixed(hit.contribution), shareBar(Math.max(0, hit.contribution ?? 0) / most)))))));
}

/** The details of `event`, as `GET /v1/events` sends it. */
export function eventDetail(event) {
  const facts = [["Request", event.request_id, "mono"], ["Text", `number ${event.choice} of the request, decided by token ${event.token_index}`],
    ["Key", event.key_id], ["Time", moment(event.time)], ["Model", event.model], ["Bank", event.bank, "mono"], ["Policy", event.policy, "mono"]];
  return el("div", { class: "event-detail" },
    hitsTable(event.features, event.domain),
    el("div", { class: "event-foot" },
      el("dl", { class: "facts" }, facts.filter(([, value]) => value !== null && value !== undefined && value !== "")
        .map(([label, value, kind = ""]) => [el("dt", { text: label }), el("dd", {}, el("bdi", { class: kind, text: value }))])),
      el("div", { class: "event-acts" }, traceOpener(event), markBar(event))));
}

function traceOpener(event) {
  const why = hindrance();
  const note = el("p", { class: "soft trace-note", text: why ?? "", attrs: { role: "status", id: unique("why") } });
  const open = button("Open its trace", async () => {
    open.disabled = true;
    note.textContent = "Looking it up in the audit…";
    try {
      const problem = await handOver(event);
      note.textContent = problem ?? "";
    } catch (error) {
      note.textContent = error.status === 403 ? "Only an admin key may read the audit." : error.message;
    }
    open.disabled = false;
  }, { class: "btn small", attrs: { disabled: why !== null }, aria: { describedby: note.id } });
  return el("div", { class: "trace-open" }, open, note);
}

/** Why no text can be read back from this server with this key, or null if it may be tried. */
function hindrance() {
  if (!about.audit.on) return "This server keeps no audit, so the text is not stored anywhere. Start it with --audit FILE to keep verdicts.";
  if (!about.keys && !about.can.audit) return "The audit is read with an admin key, and this server has none: set SAILGUARD_ADMIN_KEYS.";
  if (!about.can.audit) return "Only an admin key may read the audit.";
  if (!about.audit.text) return "The audit keeps verdicts, not texts. Texts are kept where SAILGUARD_AUDIT_TEXT is set.";
  return null;
}

/** Hand the text of `event` to the playground. Resolves with why that is not possible, or null. */
async function handOver(event) {
  const entries = (await get("admin/audit", { request_id: event.request_id, limit: 500 })).data;
  const same = ["choice", "phase", "domain", "token_index"];
  const entry = entries.find((one) => one.rule === event.rule && same.every((name) => one[name] === event[name]))
    ?? entries.find((one) => same.every((name) => one[name] === event[name]));
  if (entry === undefined) return "The audit has no such entry any more: entries are removed after the days that the server is set to keep them.";
  if (entry.text === null) return "The audit kept this verdict without its text.";
  sessionStorage.setItem(HANDOVER, JSON.stringify({ text: entry.text, role: entry.phase === "prompt" ? "prompt" : "response" }));
  location.hash = "#/playground";
  return null;
}
