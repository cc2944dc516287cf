// The token flow of one run: cells inside bubbles, tinted, of which one at a time can be selected.
//
// Cells are plain inline spans, so that letters of Arabic join and lines break as in any text. Only the selected one is
// something to a screen reader and to the tab key: thousands of buttons would be of no use to anybody.

import { el } from "../dom.js";
import { moved } from "./token_keys.js";
import { inWords } from "./tint.js";

const CHUNK = 200;
const WHO = { system: "System", user: "User", assistant: "Assistant", prompt: "Prompt", response: "Response", passage: "Passage", context: "Prompt" };

/** A run's text on the page. */
export class TokenFlow {
  #spans = [];
  #bubble = null;
  #pending = [];
  #stop = null; // the one cell that the tab key reaches
  #hinted = null;

  /**
   * run: a Run. shadeOf(cell): its tint. onSelect(cell or null). identify(text, g): {role, lead, earlier} of a segment of
   * the prompt. role: of the whole text where it is no conversation.
   */
  constructor(run, { label, shadeOf, onSelect, identify, role = null }) {
    Object.assign(this, { run, shadeOf, onSelect, identify, role, selected: null });
    this.earlier = null;
    this.element = el("div", { class: "pg-flow", attrs: { role: "group" }, aria: { label }, data: { run: run.name },
      on: {
        click: (event) => this.#clicked(event),
        keydown: (event) => this.#pressed(event),
        focusin: (event) => { if (event.target === this.#stop?.span) this.select(this.#stop.at); },
        pointerover: (event) => this.#pointed(event),
      } });
  }

  /** Draw cells that have just come. */
  add(cells) {
    for (const cell of cells) {
      if (this.#bubble === null || this.#bubble.phase !== cell.phase || this.#bubble.g !== cell.g) this.#open(cell);
      const chunk = this.#chunk();
      const span = el("span", { text: cell.text || "\u200b", data: { index: cell.index, phase: cell.phase } });
      span.at = cell.at;
      this.#paint(span, cell);
      this.#spans[cell.at] = span;
      chunk.append(span);
      this.#bubble.count += 1;
      this.#bubble.text += cell.text;
      this.#bubble.breaks = cell.text.endsWith("\n");
      if (this.#stop === null) this.#makeStop(cell.at);
    }
    if (cells.length) this.#placePending();
  }

  /** Put a mark behind the token that it is about; behind the last one if that was never shown. */
  mark(element, phase, index) {
    if (this.run.waitsFor(phase, index)) this.#pending.push([element, phase, index]);
    else this.#place(element, phase, index);
  }

  /** No more cells come. */
  finish() {
    this.run.flush();
    this.add(this.run.cells.slice(this.#spans.length));
    this.#placePending();
    this.#close();
  }

  /** Something that stands behind all that has been said so far. */
  append(...elements) {
    this.element.append(...elements);
  }

  /** Tint all cells anew. */
  retint() {
    for (const cell of this.run.cells) if (this.#spans[cell.at]) this.#paint(this.#spans[cell.at], cell);
  }

  /** Select a cell by its place among the cells; null for none. */
  select(at, { focus = false, tell = true } = {}) {
    const same = this.selected === at;
    if (this.selected !== null && !same) this.#unmark(this.selected);
    this.selected = at;
    if (at !== null && this.#spans[at]) {
      this.#makeStop(at);
      const { span } = this.#stop;
      span.classList.add("sel");
      span.setAttribute("aria-current", "true");
      span.closest("details:not([open])")?.setAttribute("open", "");
      if (focus) span.focus({ preventScroll: true });
      span.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
    if (tell && !same) this.onSelect(at === null ? null : this.run.cells[at]);
  }

  /** Outline a cell for the moment, as one that something else on the page points at. */
  hint(at) {
    this.#hinted?.classList.remove("hint");
    this.#hinted = at === null ? null : this.#spans[at] ?? null;
    this.#hinted?.classList.add("hint");
  }

  #open(cell) {
    this.#close();
    const answer = cell.phase === "response" && this.role === null;
    const role = answer ? "assistant" : this.role ?? "context";
    const who = el("p", { class: "pg-who", text: answer ? "Answer" : WHO[role] });
    const body = el("div", { class: "pg-text" });
    const element = el("div", { class: "pg-bubble", data: { role, phase: cell.phase } }, who, body);
    this.#bubble = { phase: cell.phase, g: cell.g, element, who, body, count: 0, text: "", breaks: false, first: cell.at };
    this.element.append(element);
  }

  /** A segment of the prompt is whole: now it can be told whose message it is. */
  #close() {
    const bubble = this.#bubble;
    this.#bubble = null;
    if (bubble === null || bubble.phase !== "prompt" || this.role !== null) return;
    const { role, lead, earlier } = this.identify(bubble.text, bubble.g);
    bubble.element.dataset.role = role;
    bubble.who.textContent = WHO[role];
    bubble.who.hidden = lead > 0; // the template's own name of the speaker stands there
    let length = 0;
    for (let at = bubble.first; lead > 0 && at < this.#spans.length; at += 1) {
      length += this.run.cells[at].text.length;
      if (length > lead) break;
      this.#spans[at].classList.add("lead");
    }
    if (earlier) this.#putBack(bubble.element);
  }

  /** Messages that an earlier turn has shown already do not need to be read twice. */
  #putBack(element) {
    if (this.earlier === null) {
      this.earlier = el("details", { class: "pg-earlier" }, el("summary", { text: "Earlier messages, as read in this run" }));
      this.element.prepend(this.earlier);
    }
    this.earlier.append(element);
  }

  /** The element that takes the next cell. A line's end is where text can be cut without a trace. */
  #chunk() {
    const bubble = this.#bubble;
    if (bubble.chunk === undefined || (bubble.count >= CHUNK && bubble.breaks)) {
      bubble.chunk = el("div", { class: "pg-chunk", attrs: { dir: "auto" } });
      bubble.body.append(bubble.chunk);
      bubble.count = 0;
    }
    return bubble.chunk;
  }

  #paint(span, cell) {
    const found = this.shadeOf(cell);
    const kept = ["sel", "lead", "linked"].filter((name) => span.classList.contains(name));
    span.className = ["tok", found.hue, `l${found.level}`, found.level === 4 ? "over" : "", ...kept].join(" ");
    if (span === this.#stop?.span) span.setAttribute("aria-label", this.#name(cell));
  }

  #place(element, phase, index) {
    const cell = this.run.cellOf(phase, index);
    let before = cell && this.#spans[cell.at];
    if (!before) {
      (this.#bubble?.body ?? this.element).append(element);
      return;
    }
    while (before.nextElementSibling?.classList.contains("verdict")) before = before.nextElementSibling;
    before.after(element);
  }

  #placePending() {
    const waiting = this.#pending.splice(0);
    for (const one of waiting) this.mark(...one);
  }

  #makeStop(at) {
    const old = this.#stop?.span;
    const span = this.#spans[at];
    if (old === span) return;
    for (const name of ["tabindex", "role", "aria-roledescription", "aria-label", "aria-current"]) old?.removeAttribute(name);
    this.#stop = { at, span };
    span.tabIndex = 0;
    span.setAttribute("role", "button");
    span.setAttribute("aria-roledescription", "token");
    span.setAttribute("aria-label", this.#name(this.run.cells[at]));
  }

  #name(cell) {
    const text = cell.text.trim() || (cell.text.includes("\n") ? "line break" : "space");
    return `${text}, token ${cell.index} of the ${cell.phase === "prompt" ? "prompt" : "answer"}, ${inWords(this.shadeOf(cell))}`;
  }

  #unmark(at) {
    this.#spans[at]?.classList.remove("sel");
    this.#spans[at]?.removeAttribute("aria-current");
  }

  #clicked(event) {
    const span = event.target.closest(".tok");
    // A stretch of text that was marked with the pointer is for copying.
    if (!span || span.at === undefined || !getSelection().isCollapsed) return;
    this.select(span.at, { focus: true });
  }

  #pressed(event) {
    if (!event.target.classList?.contains("tok") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") {
      this.select(null);
    } else if (event.key === "Enter" || event.key === " ") {
      this.select(this.#stop.at);
    } else {
      const at = moved(event.key, this.#stop.at, this.#spans);
      if (at === null) return;
      this.select(at, { focus: true });
    }
    event.preventDefault();
  }

  #pointed(event) {
    const span = event.target.closest(".tok");
    if (span?.at !== undefined) span.title = inWords(this.shadeOf(this.run.cells[span.at]));
  }
}
