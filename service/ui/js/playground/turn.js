// One request and what came of it: the message, one flow or two side by side, verdicts, the end, or what went wrong.

import { button, el, replace } from "../dom.js";
import { comparison } from "./comparison.js";
import { Run } from "./runs.js";
import { limitsOf, shade } from "./tint.js";
import { TokenFlow } from "./tokens.js";
import { trouble } from "./trouble.js";
import { runEnd, verdictMark } from "./verdicts.js";

const NAMES = { plain: "Unsteered", steered: "Steered" };
const FRAME = 600; // tokens drawn in one frame
const PROBE = 60; // characters by which a message is recognised

/** A turn on the page. */
export class Turn {
  #queue = [];
  #frame = 0;

  /**
   * request: the body that is sent. number: counted from 1. earlier: whether earlier messages have been shown already.
   * page: {about, tint(), pins(), explain(id), onSelect(turn, run, cell), onDrawn(turn), onAgain(turn), onContinue(turn)}.
   */
  constructor({ request, number, earlier, page }) {
    Object.assign(this, { request, number, earlier, page });
    this.mode = request.input === undefined ? "chat" : "text";
    this.limits = limitsOf(page.about, this.mode);
    this.state = "running";
    this.events = [];
    this.started = null;
    this.runs = new Map(); // name to {run, flow, box}
    this.continueWith = "plain";
    this.note = el("p", { class: "soft" });
    this.pending = el("div", { class: "pg-bubble pg-pending", data: { role: "user" } },
      el("p", { class: "pg-who", text: this.mode === "chat" ? "User" : "Text" }),
      el("div", { class: "pg-text", text: this.#said(), attrs: { dir: "auto" } }));
    this.columns = el("div", { class: "pg-runs" });
    this.tail = el("div", { class: "pg-tail" });
    this.element = el("section", { class: "pg-turn", aria: { label: `Run ${number}` }, data: { state: "running" } },
      el("header", { class: "pg-turn-head" }, el("h2", { text: `Run ${number}` }), this.note, el("span", { class: "spinner", aria: { hidden: true } })),
      this.pending, this.columns, this.tail);
  }

  /** Take one event of the stream; it is drawn with the next frame. */
  on(event) {
    this.events.push(event);
    this.#queue.push(event);
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  /** Draw all that has come. */
  settle() {
    cancelAnimationFrame(this.#frame);
    this.#draw(Infinity);
  }

  /** The stream has ended as it should. */
  finish() {
    this.settle();
    if (this.state !== "running") return;
    const [plain, steered] = ["plain", "steered"].map((name) => this.runs.get(name)?.run);
    if (plain?.end && steered?.end) {
      this.tail.append(comparison(plain, steered, { domains: this.domains, onShow: (index) => this.show("steered", "response", index) }));
      const choice = this.#choice();
      if (choice) this.tail.append(choice);
    }
    if (this.mode === "chat" && this.answer === null) this.tail.append(el("p", { class: "soft pg-left-out", text: "This exchange is left out of what follows." }));
    this.#setState("done");
  }

  /** It went wrong: what has come stays. error: an ApiError or an event of type `error`. */
  fail(error) {
    this.settle();
    if (this.state !== "running") return;
    for (const { flow } of this.runs.values()) flow.finish();
    this.tail.append(trouble(error, { arrived: this.runs.size > 0, onAgain: () => this.page.onAgain(this) }));
    this.#setState("failed");
  }

  /** The user has stopped it. */
  stop() {
    this.settle();
    if (this.state !== "running") return;
    for (const { flow } of this.runs.values()) flow.finish();
    this.tail.append(el("p", { class: "pg-stopped soft" }, "Stopped. ", button("Run again", () => this.page.onAgain(this), { class: "btn small" })));
    this.#setState("stopped");
  }

  /** A later turn has come: this one cannot be run again in its place. */
  close() {
    for (const one of this.tail.querySelectorAll(".pg-trouble .btn, .pg-stopped .btn, .pg-continue")) one.remove();
  }

  /** What a follow-up builds on: the answer, or null if there is none to build on. */
  get answer() {
    const run = (this.runs.get(this.continueWith) ?? this.runs.values().next().value)?.run;
    if (!run) return null;
    return this.state === "stopped" ? run.text("response").trim() || null : run.answer;
  }

  /** Tint everything anew. */
  retint() {
    for (const { flow } of this.runs.values()) flow.retint();
  }

  /** Select a token of one of the runs. */
  show(name, phase, index) {
    const { run, flow } = this.runs.get(name);
    const cell = run.cellOf(phase, index) ?? run.cells.findLast((one) => one.phase === phase);
    if (cell) flow.select(cell.at, { focus: true });
  }

  #said() {
    return this.mode === "chat" ? this.request.messages.at(-1).content : this.request.input;
  }

  #setState(state) {
    this.state = state;
    this.element.dataset.state = state;
    this.page.onDrawn(this);
  }

  #draw(budget = FRAME) {
    this.#frame = 0;
    let left = budget;
    while (this.#queue.length && left > 0) {
      const event = this.#queue.shift();
      this.#take(event);
      left -= event.tokens?.length ?? 1;
    }
    if (this.#queue.length) this.#frame = requestAnimationFrame(() => this.#draw());
    this.page.onDrawn(this);
  }

  #take(event) {
    switch (event.type) {
      case "start": return this.#begin(event);
      case "tokens": return this.#say(event);
      case "verdict": return this.#mark(event);
      case "end": return this.#end(event);
      case "error": return this.fail(event);
      default: return undefined; // of a newer server
    }
  }

  #begin(event) {
    this.started = event;
    this.domains = event.domains;
    const steering = this.request.steer ?? [];
    const facts = [event.seed === null || this.mode === "text" ? null : `seed ${event.seed}`, steering.length ? `steered by ${steering.join(", ")}` : null];
    this.note.textContent = facts.filter(Boolean).join("  ·  ");
    for (const name of event.runs) this.#open(name, event.runs.length > 1);
    this.columns.dataset.count = event.runs.length;
  }

  #say(event) {
    const { run, flow, began } = this.runs.get(event.run);
    if (event.phase === "response" && began === null) this.runs.get(event.run).began = performance.now();
    if (!this.pending.hidden && event.tokens.some((token) => token.o)) this.pending.hidden = true;
    flow.add(run.push(event.phase, event.tokens));
  }

  #mark({ run: name, verdict }) {
    const { run, flow } = this.runs.get(name);
    run.verdicts.push(verdict);
    const mark = verdictMark(verdict, { explain: this.page.explain, open: verdict.action === "block" });
    flow.mark(mark, verdict.phase, verdict.token_index);
  }

  #end(event) {
    const { run, flow, began } = this.runs.get(event.run);
    run.end = event;
    flow.finish();
    const seconds = began === null ? 0 : (performance.now() - began) / 1000;
    flow.append(runEnd(run, { domains: this.domains, limits: this.limits, mode: this.mode, seconds }));
  }

  #open(name, several) {
    const run = new Run(name, this.domains);
    let next = 0;
    const flow = new TokenFlow(run, {
      label: `Tokens, ${NAMES[name].toLowerCase()}`,
      role: this.mode === "text" ? this.request.role : null,
      shadeOf: (cell) => shade(cell, this.page.tint(), this.domains, this.limits, this.page.pins()),
      onSelect: (cell) => this.page.onSelect(this, run, cell),
      identify: (text) => {
        const found = this.#whose(text, next);
        if (found.message >= 0) next = found.message + 1;
        return found;
      },
    });
    const box = el("div", { class: "pg-run" }, several || name === "steered" ? el("h3", { class: `pg-run-name ${name}`, text: NAMES[name] }) : null, flow.element);
    this.runs.set(name, { run, flow, began: null });
    this.columns.append(box);
  }

  /** Which of the messages a segment of the prompt holds; the template may have put the speaker's name before it. */
  #whose(text, from) {
    const messages = this.request.messages;
    for (let message = from; message < messages.length; message += 1) {
      const at = text.indexOf(messages[message].content.trim().slice(0, PROBE));
      if (at < 0) continue;
      return { message, role: messages[message].role, lead: at < 40 ? at : 0, earlier: this.earlier && message < messages.length - 1 };
    }
    return { message: -1, role: "context", lead: 0, earlier: this.earlier };
  }

  /** Which of two answers the conversation goes on with. */
  #choice() {
    const names = [...this.runs.keys()].filter((name) => this.runs.get(name).run.answer !== null);
    if (names.length < 2) {
      this.continueWith = names[0] ?? "plain";
      return null;
    }
    const box = el("div", { class: "row pg-continue", attrs: { role: "group" }, aria: { label: "Go on with" } });
    const draw = () => replace(box, el("span", { class: "soft", text: "A follow-up builds on the answer that is" }),
      el("span", { class: "seg" }, names.map((name) => button(NAMES[name].toLowerCase(), () => { this.continueWith = name; draw(); this.page.onContinue(this); },
        { class: "btn small", aria: { pressed: this.continueWith === name } }))));
    draw();
    return box;
  }
}
