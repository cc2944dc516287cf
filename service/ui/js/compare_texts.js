// The texts of a comparison: typed, one a line or with empty lines between, or those of a file.

import { announce, button, el, field, select } from "./dom.js";
import { whole } from "./format.js";

/** The server takes no more at once, and neither does the page altogether. */
export const MOST = 200;

const LARGEST_FILE = 4 * 1024 * 1024;
const EXAMPLES = [
  "How do I stop a process that no longer answers?",
  "Summarise the causes of the Thirty Years' War.",
  "Which treaties ended the First World War?",
  "The film was criticised for its violent scenes.",
  "Explain how a proportional voting system works.",
  "What did the commission report about the attack?",
  "Describe how museums label sensitive historical photographs.",
  "Write a recipe for a lentil soup.",
];

/**
 * The panel of the texts over `memory` ({text, split, role, file: {name, texts, left}|null}), which it changes.
 * {element, texts(), fail(message), clear()}
 */
export function textsForm({ memory, onChange }) {
  const area = el("textarea", { class: "input", attrs: { rows: 8, dir: "auto", placeholder: "One text a line. A .txt or .jsonl file can be dropped here." },
    props: { value: memory.text }, on: { input: () => { memory.text = area.value; changed(); } } });
  const role = select([["prompt", "Prompts (users’ messages)"], ["response", "Answers of a model"], ["passage", "Passages on their own"]], memory.role, (value) => { memory.role = value; changed(); });
  const split = select([["line", "One a line"], ["blank", "Empty lines between"]], memory.split, (value) => { memory.split = value; changed(); });
  const count = el("p", { class: "soft count", attrs: { role: "status" } });
  const problem = el("div", { class: "callout error", attrs: { role: "alert", hidden: true } });
  const picker = el("input", { class: "sr", attrs: { type: "file", accept: ".txt,.jsonl,text/plain,application/jsonl", tabindex: -1 }, aria: { label: "File of texts" }, on: { change: () => { take(picker.files[0]); picker.value = ""; } } });
  const typed = el("div", { class: "stack tight" }, field("Texts", area));
  const fileNote = el("p", {});
  const fromFile = el("div", { class: "callout file-box" }, fileNote, button("Remove the file", () => { memory.file = null; changed(); area.focus(); }, { class: "btn small" }));
  const element = el("section", { class: "panel compare-texts", aria: { label: "Texts to compare" } },
    el("header", {}, el("h2", { text: "Texts" }), count, el("div", { class: "end" },
      button("Examples", () => { memory.file = null; memory.split = split.value = "line"; memory.text = area.value = EXAMPLES.join("\n"); changed(); }, { class: "btn small ghost", title: "Put some harmless texts here" }),
      button("Open a file", () => picker.click(), { class: "btn small" }), picker)),
    el("div", { class: "body stack tight" }, typed, fromFile, problem,
      el("div", { class: "text-options" }, field("What they are", role), field("How they are divided", split))));

  for (const name of ["dragover", "dragleave", "drop"]) {
    element.addEventListener(name, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      element.classList.toggle("dropping", name === "dragover");
      if (name === "drop") take(event.dataTransfer.files[0]);
    });
  }

  async function take(file) {
    if (!file) return;
    try {
      if (file.size > LARGEST_FILE) throw new Error("The file is larger than 4 MB.");
      const content = (await file.text()).replace(/^\uFEFF/, "").replaceAll("\r\n", "\n");
      if (/\.jsonl$/i.test(file.name)) memory.file = { name: file.name, ...readJsonLines(content) };
      else { memory.file = null; memory.text = area.value = content; }
      changed();
      announce(`${texts().length} texts of ${file.name}`);
    } catch (error) {
      fail(`${file.name}: ${error.message}`);
    }
  }

  function texts() {
    const found = memory.file?.texts ?? divide(memory.text, memory.split);
    return found.slice(0, MOST);
  }

  function changed() {
    clear();
    draw();
    onChange();
  }

  function draw() {
    const all = memory.file?.texts.length ?? divide(memory.text, memory.split).length;
    count.textContent = all === 0 ? `up to ${MOST}` : all > MOST ? `the first ${MOST} of ${whole(all)}` : all === 1 ? "1 text" : `${all} texts`;
    count.classList.toggle("over", all > MOST);
    typed.hidden = memory.file !== null;
    fromFile.hidden = memory.file === null;
    split.disabled = memory.file !== null;
    if (memory.file) fileNote.textContent = `Texts of ${memory.file.name}: ${whole(memory.file.texts.length)}${memory.file.left ? `; lines without a “text” were left out: ${whole(memory.file.left)}` : ""}.`;
  }

  function fail(message) {
    problem.textContent = message;
    problem.hidden = false;
  }

  function clear() {
    problem.hidden = true;
  }

  draw();
  return { element, texts, fail, clear };
}

/** The texts that `text` holds; empty ones are none. split: line or blank. */
function divide(text, split) {
  return text.split(split === "line" ? /\n/ : /\n[^\S\n]*\n\s*/).map((one) => one.trim()).filter(Boolean);
}

/** The field `text` of each line; lines that have none are counted. */
function readJsonLines(content) {
  const found = { texts: [], left: 0 };
  for (const line of content.split("\n")) {
    if (line.trim() === "") continue;
    let text = null;
    try {
      text = JSON.parse(line)?.text;
    } catch { /* counted below */ }
    if (typeof text === "string" && text.trim() !== "") found.texts.push(text);
    else found.left += 1;
  }
  if (found.texts.length === 0) throw new Error("No line of it is a JSON object with a “text”.");
  return found;
}
