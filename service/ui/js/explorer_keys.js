// The keys of the Explorer: which there are, and whether a key counts or was typed into something.

import { button, el } from "./dom.js";

const SETTING = "sailguard-keys";
const FIELDS = "input:not([type=checkbox]), select, textarea, [contenteditable], .review-form, dialog";
const KEYS = [
  [["j", "↓"], "Next feature (arrows: in the list)"], [["k", "↑"], "Feature before"], [["a"], "Accept it"], [["r"], "Reject it: then 1 to 6 for a reason, Enter"],
  [["e"], "Relabel it: then Ctrl+Enter"], [["n"], "Write a note on it: then Enter"], [["u"], "Take the last review back"], [["Esc"], "Close a form; what was typed is kept"],
  [["/"], "Search"], [["?"], "These keys"],
];

/** Whether a key event is a command: not typed into a field, nor part of the browser's own. */
export function isCommand(event) {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.repeat && event.key.length === 1 && !"jk".includes(event.key)) return false;
  if (document.querySelector("dialog[open]") || event.target.closest?.(FIELDS)) return false;
  return event.key === "Escape" || event.key === "?" || localStorage.getItem(SETTING) !== "no";
}

/** Show the keys. They can be switched off: single letters get in the way of speech input. */
export function showKeys() {
  const on = el("input", { attrs: { type: "checkbox", checked: localStorage.getItem(SETTING) !== "no" }, on: { change: () => localStorage.setItem(SETTING, on.checked ? "yes" : "no") } });
  const dialog = el("dialog", { class: "dialog keys", aria: { label: "Keys" }, on: { close: () => dialog.remove() } },
    el("form", { attrs: { method: "dialog" } },
      el("h2", { text: "Keys" }),
      el("dl", { class: "facts" }, KEYS.map(([keys, text]) => [el("dt", {}, keys.map((key) => el("kbd", { text: key }))), el("dd", { text })])),
      el("label", { class: "check" }, on, "Single keys act"),
      el("div", { class: "row end" }, button("Close", () => dialog.close(), { class: "btn" }))));
  document.body.append(dialog);
  dialog.showModal();
}
