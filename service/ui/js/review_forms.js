// The small forms of reviewing. Each makes {element, focus, read}: read() gives what is sent, or throws what is missing as an Error.

import { button, el, field, replace, unique } from "./dom.js";
import { hue } from "./format.js";

const LONGEST = 2000;
/** What one rejects a feature for, by the number keys. */
export const REASONS = ["Fires on unrelated text", "Explanation is wrong", "Duplicate of another feature", "Too rare to judge", "Token artefact", "Fires almost everywhere"];

/** Who reviews. */
export function nameForm(name) {
  const input = el("input", { class: "input", attrs: { maxlength: 100, autocomplete: "name", value: name } });
  return shell("name", "Save name", [field("Your name", input, "It stands beside your reviews in the bank's log, and stays in this browser.")], {
    focus: input,
    read: () => needed(input.value, "Give a name: reviews carry it."),
  });
}

/** Why it is rejected. */
export function rejectForm() {
  const group = unique("reason");
  const radios = REASONS.map((reason) => el("input", { attrs: { type: "radio", name: group, value: reason } }));
  const text = el("input", { class: "input", attrs: { maxlength: LONGEST - 100, autocomplete: "off" } });
  return shell("reject", "Reject this feature", [choices("Why is it rejected?", radios, REASONS), field("In your words", text)], {
    focus: radios[0], radios, danger: true,
    read: () => ({ reason: needed([radios.find((one) => one.checked)?.value, text.value.trim()].filter(Boolean).join(": "), "Choose a reason (keys 1 to 6), or write one.") }),
  });
}

/** A remark that is no verdict. */
export function noteForm() {
  const text = el("input", { class: "input", attrs: { maxlength: LONGEST, autocomplete: "off" } });
  return shell("note", "Save note", [field("Note", text, "A note changes neither labels nor status.")], {
    focus: text,
    read: () => ({ reason: needed(text.value, "Write a note.") }),
  });
}

/** How a verdict is taken back; ways as of `waysBack`. */
export function undoForm(feature, ways) {
  const group = unique("undo");
  const radios = ways.map((way, index) => el("input", { attrs: { type: "radio", name: group, value: index, checked: index === 0 } }));
  return shell("undo", "Undo so", [
    el("p", {}, el("b", { text: feature }), " had not been reviewed before. The log is only ever added to, and no verdict in it means unreviewed. So choose what holds from now on."),
    choices("What holds from now on?", radios, ways.map((way) => way.text)),
  ], { focus: radios[0], radios, read: () => ways[Number(radios.find((one) => one.checked).value)] });
}

/** Other labels in the place of the machine's. label: those that hold now. */
export function relabelForm(label, { domains, concepts }) {
  let chosen = [...label.concepts];
  const toggles = domains.map((domain) => el("button", { class: `btn small toggle ${hue(domain)}`, text: domain, attrs: { type: "button", "aria-pressed": label.domains.includes(domain) ? "true" : "false" },
    on: { click: ({ currentTarget: one }) => one.setAttribute("aria-pressed", one.getAttribute("aria-pressed") === "true" ? "false" : "true") } }));
  const list = el("datalist", { attrs: { id: unique("concepts") } }, concepts.map((name) => el("option", { attrs: { value: name } })));
  const adding = el("input", { class: "input", attrs: { list: list.id, maxlength: 100, autocomplete: "off", spellcheck: false } });
  const shown = el("ul", { class: "chips" });
  const draw = () => replace(shown, chosen.map((name) => el("li", { class: "chip" }, el("bdi", { text: name }),
    button("×", () => { chosen = chosen.filter((one) => one !== name); draw(); adding.focus(); }, { class: "chip-remove", aria: { label: `Remove ${name}` } }))));
  const add = () => {
    const name = adding.value.trim();
    if (name && !chosen.includes(name)) chosen = [...chosen, name];
    adding.value = "";
    draw();
  };
  adding.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
    event.preventDefault(); // it adds, and does not send
    add();
  });
  adding.addEventListener("change", () => concepts.includes(adding.value.trim()) && add());
  const explanation = el("textarea", { class: "input", text: label.explanation, attrs: { maxlength: LONGEST, rows: 2, dir: "auto" } });
  const reason = el("input", { class: "input", attrs: { maxlength: LONGEST, autocomplete: "off" } });
  draw();
  const read = () => {
    add();
    const set = toggles.filter((one) => one.getAttribute("aria-pressed") === "true").map((one) => one.textContent);
    const overrides = {};
    if (!same(set, label.domains)) overrides.domains = set;
    if (!same(chosen, label.concepts)) overrides.concepts = chosen;
    const text = explanation.value.replace(/\s+/g, " ").trim();
    if (text !== label.explanation.replace(/\s+/g, " ").trim()) overrides.explanation = needed(text, "Write an explanation, or leave it as it was.");
    if (Object.keys(overrides).length === 0) throw new Error("Nothing is changed yet: choose other domains or concepts, or write another explanation.");
    return { overrides, reason: reason.value.trim() };
  };
  return shell("relabel", "Save labels", [
    el("fieldset", { class: "bare" }, el("legend", { text: "Domains" }), el("div", { class: "row" }, toggles)),
    el("div", { class: "form-pair" }, el("div", { class: "stack tight" }, field("Add a concept", adding, "Enter adds it."), list, shown), field("Explanation", explanation)),
    field("Reason (optional)", reason),
  ], { focus: toggles[0], read, hint: "Ctrl+Enter" });
}

function shell(kind, sends, body, { focus, read, radios = [], danger = false, hint = "Enter" }) {
  const wrong = el("p", { class: "form-wrong", attrs: { role: "alert" } });
  const element = el("form", { class: `review-form form-${kind}`, data: { form: kind } }, body, wrong,
    el("div", { class: "row end" }, el("span", { class: "soft small keys-hint" }, el("kbd", { text: hint }), " sends, ", el("kbd", { text: "Esc" }), " closes"),
      el("button", { class: "btn small ghost", text: "Cancel", attrs: { type: "button", "data-cancel": true } }),
      el("button", { class: `btn small ${danger ? "bad" : "primary"}`, text: sends, attrs: { type: "submit" } })));
  element.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      element.requestSubmit();
    }
    const typing = event.target.matches("input:not([type=radio]), textarea");
    const radio = typing || event.ctrlKey || event.metaKey || event.altKey ? undefined : radios[Number(event.key) - 1];
    if (radio) {
      event.preventDefault();
      radio.checked = true;
      radio.focus();
    }
  });
  const tell = (text) => { wrong.textContent = text; };
  return { kind, element, focus: () => focus.focus(), read, tell };
}

function choices(legend, radios, texts) {
  return el("fieldset", { class: "bare" }, el("legend", { text: legend }),
    el("div", { class: "choices" }, radios.map((radio, index) => el("label", { class: "choice" }, radio, el("kbd", { text: index + 1, aria: { hidden: true } }), el("span", { text: texts[index] })))));
}

function needed(text, otherwise) {
  const found = text.trim();
  if (!found) throw new Error(otherwise);
  return found;
}

function same(a, b) {
  return a.length === b.length && a.every((one) => b.includes(one));
}
