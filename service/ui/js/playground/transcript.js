// The list of turns, and the scrolling that follows it while the reader is at its end.

import { button, el } from "../dom.js";

const NEAR = 90; // pixels from the end that count as being there
const NARROW = matchMedia("(max-width: 62rem)");
const EXAMPLES = [
  "How do I kill a Python process?",
  "Summarise the causes of the First World War.",
  "Which parties stood in the last election, and how are votes counted?",
  "请简要介绍古代城墙的作用。",
  "ما هي أهم أسباب الهجرة في التاريخ؟",
];

/** Everything that has been run. onExample(text): one of the examples was chosen. */
export class Transcript {
  #following = true;

  constructor({ onExample }) {
    this.turns = [];
    this.onExample = onExample;
    this.notices = el("div", { class: "pg-notices" });
    this.past = el("div", { class: "pg-past" });
    this.list = el("div", { class: "pg-turns" });
    this.empty = this.#welcome();
    this.jump = button("To the end", () => { this.#following = true; this.follow(); }, { class: "btn small pg-jump" });
    this.jump.hidden = true;
    this.element = el("div", { class: "pg-transcript", attrs: { id: "pg-transcript", role: "region", tabindex: "0" }, aria: { label: "Transcript" } },
      this.notices, this.past, this.empty, this.list);
  }

  /** Listen to scrolling. Returns what ends that. */
  watch() {
    const seen = () => {
      const box = this.#scroller();
      this.#following = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR;
      if (this.#following) this.jump.hidden = true;
    };
    this.element.addEventListener("scroll", seen, { passive: true });
    addEventListener("scroll", seen, { passive: true });
    return () => {
      this.element.removeEventListener("scroll", seen);
      removeEventListener("scroll", seen);
    };
  }

  /** Add a turn at the end. */
  add(turn) {
    this.turns.at(-1)?.close();
    this.turns.push(turn);
    this.empty.hidden = true;
    this.notices.replaceChildren();
    this.list.append(turn.element);
    this.#following = true;
    this.follow();
  }

  /** Take away a turn of which nothing came. */
  drop(turn) {
    this.turns = this.turns.filter((one) => one !== turn);
    turn.element.remove();
  }

  /** Keep the end in sight, if the reader was there. */
  follow() {
    const box = this.#scroller();
    if (this.#following) box.scrollTop = box.scrollHeight;
    this.jump.hidden = this.#following;
  }

  /** Take everything away. */
  clear() {
    this.turns = [];
    for (const box of [this.notices, this.past, this.list]) box.replaceChildren();
    this.empty.hidden = false;
    this.jump.hidden = true;
  }

  /** Say something above the turns. kind: error, warn or nothing. */
  notice(text, kind = "") {
    const note = el("p", { class: `callout ${kind}`, text, attrs: { role: kind === "error" ? "alert" : "status", dir: "auto" } });
    this.notices.append(note);
    return note;
  }

  /** Messages that came with a link: they are sent, but have not been read in this tab. */
  showPast(messages) {
    this.past.replaceChildren();
    if (messages.length === 0) return;
    this.empty.hidden = true;
    this.past.append(el("p", { class: "soft pg-past-note", text: "From the link. These messages go along with the next one." }),
      ...messages.map(({ role, content }) => el("div", { class: "pg-bubble", data: { role } },
        el("p", { class: "pg-who", text: role === "assistant" ? "Answer" : "User" }), el("div", { class: "pg-text", text: content, attrs: { dir: "auto" } }))));
  }

  /** What an empty page says. chat: whether the examples can be sent as messages. */
  describe({ model, chat }) {
    this.empty.querySelector(".pg-lead").textContent = chat
      ? `Ask ${model} something and watch what its features say of every token, or paste a text to have it read.`
      : `Paste a text to see what the features of ${model} say of every token.`;
  }

  #welcome() {
    return el("div", { class: "pg-welcome" },
      el("h2", { text: "See what the guard sees" }),
      el("p", { class: "soft pg-lead" }),
      el("div", { class: "pg-examples", attrs: { role: "group" }, aria: { label: "Examples" } },
        EXAMPLES.map((text) => button(text, () => this.onExample(text), { class: "btn pg-example", attrs: { dir: "auto" } }))));
  }

  #scroller() {
    return NARROW.matches ? document.scrollingElement : this.element;
  }
}
