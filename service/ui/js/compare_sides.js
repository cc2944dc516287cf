// One side of a comparison: which bank and which policy, by name or as text.

import { get } from "./api.js";
import { about } from "./app.js";
import { button, el, field, replace, select } from "./dom.js";

/** Value of the policy's select that means the text below it. */
export const PASTED = "\u0000yaml";

/**
 * The form of `side` ({bank, policy, yaml}: null means what is in use), which it changes. choices: of GET /v1/compare.
 * `onChange` is called after every change. {element, draw(), fail(message), clear()}
 */
export function sideForm({ name, title, side, choices, onChange }) {
  const id = `compare-${name}`;
  const options = (list) => list.map((one) => [one.id, `${one.label}${one.current ? " (in use)" : ""}`]);
  const bank = select(options(choices.banks), "", (value) => { side.bank = value; changed(); }, { id: `${id}-bank` });
  const policy = select([...options(choices.policies), [PASTED, "Paste YAML…"]], "", (value) => { side.policy = value; draw(); changed(); if (value === PASTED) prefill(); }, { id: `${id}-policy` });
  const yaml = el("textarea", { class: "input mono", attrs: { id: `${id}-yaml`, rows: 9, spellcheck: false, autocomplete: "off", wrap: "off" }, on: { input: () => { side.yaml = yaml.value; changed(); } } });
  const note = el("small", { class: "soft", attrs: { role: "status" } });
  const problem = el("div", { class: "callout error", attrs: { role: "alert", hidden: true, id: `${id}-problem` } });
  const pasted = el("div", { class: "stack tight" }, field("Policy as YAML", yaml, "It is used for this comparison alone."), note);
  const element = el("fieldset", { class: `panel compare-side ${name}`, data: { side: name } },
    el("legend", { class: "sr", text: title }),
    el("header", {}, el("span", { class: "side-mark", text: name === "left" ? "A" : "B", aria: { hidden: true } }), el("h2", { text: title })),
    el("div", { class: "body stack tight" }, field("Bank", bank), field("Policy", policy), pasted, problem));

  function changed() {
    clear();
    onChange();
  }

  function draw() {
    chosen(bank, side.bank, choices.banks);
    chosen(policy, side.policy, choices.policies);
    if (yaml.value !== side.yaml) yaml.value = side.yaml;
    pasted.hidden = side.policy !== PASTED;
  }

  async function prefill() {
    if (side.yaml.trim() !== "") return yaml.focus();
    if (about.role !== "admin") { // the policy itself is for admins
      side.yaml = yaml.value = draft();
      note.textContent = "It begins as a draft with the server's domains; the policy in use is shown with an admin key.";
      onChange();
      return yaml.focus();
    }
    note.textContent = "Reading the policy in use…";
    try {
      const found = await get("admin/policy");
      if (side.yaml.trim() === "") side.yaml = yaml.value = found.yaml;
      note.textContent = `It begins as the policy in use, ${found.version}.`;
    } catch (error) {
      if (side.yaml.trim() === "") side.yaml = yaml.value = draft();
      note.textContent = `The policy in use could not be read, so this is a draft with its domains. ${error.message}`;
    }
    onChange();
    yaml.focus();
  }

  /** Say what the server has against this side; a line that it names can be gone to. */
  function fail(message) {
    const line = side.policy === PASTED ? Number(/\bline (\d+)/i.exec(message)?.[1] ?? 0) : 0;
    replace(problem, el("p", { text: message, attrs: { dir: "auto" } }), line > 0 ? button(`Go to line ${line}`, () => goTo(line), { class: "btn small" }) : null);
    problem.hidden = false;
    const control = side.policy === PASTED ? yaml : policy;
    control.setAttribute("aria-invalid", "true");
    control.setAttribute("aria-errormessage", problem.id);
    problem.scrollIntoView({ block: "nearest" });
  }

  function clear() {
    problem.hidden = true;
    for (const control of [yaml, policy]) {
      control.removeAttribute("aria-invalid");
      control.removeAttribute("aria-errormessage");
    }
  }

  function goTo(line) {
    const lines = yaml.value.split("\n");
    const start = lines.slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
    yaml.focus();
    yaml.setSelectionRange(start, start + (lines[line - 1]?.length ?? 0));
    yaml.scrollTop = Math.max(0, (line - 4) * (yaml.scrollHeight / Math.max(1, lines.length)));
  }

  draw();
  return { element, draw, fail, clear };
}

/** A policy to begin with: a rule for each domain, with what the policy in use does there. */
function draft() {
  const action = (domain) => about.policy.rules.find((rule) => rule.target === domain && rule.action === "block")?.action ?? "flag";
  return ["name: draft", "on_error: block", "rules:", ...about.domains.map((domain) => `  - {domain: ${domain}, threshold: {fpr: 0.01}, action: ${action(domain)}}`), ""].join("\n");
}

/** A name that is not among the choices (an old link, say) is not taken silently for another one. */
function chosen(control, value, list) {
  control.value = value;
  if (control.selectedIndex >= 0) return;
  control.append(el("option", { text: `${value} (not here)`, attrs: { value } }));
  control.value = value;
  if (list.length === 0) control.disabled = true;
}

/** What POST /v1/compare wants of `side`. */
export function sideBody(side) {
  const pasted = side.policy === PASTED;
  return { bank: side.bank || null, policy: pasted ? null : side.policy || null, yaml: pasted ? side.yaml : null };
}
