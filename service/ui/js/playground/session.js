// One sitting at the playground: its parts, and what passes between them. It outlives a visit to another view.

import { about, setState } from "../app.js";
import { stream } from "../api.js";
import { catalogue } from "../catalogue.js";
import { announce, el, toast } from "../dom.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { Inspector } from "./inspector.js";
import { download, encodeState, isFeature, runFile } from "./share.js";
import { Steering } from "./steering.js";
import { Tabs } from "./tabs.js";
import { Toolbar } from "./toolbar.js";
import { TraceChart } from "./trace_chart.js";
import { Transcript } from "./transcript.js";
import { Turn } from "./turn.js";

const MOST_PINS = 6;
const NO_TURN = "Send a message first.";

/** Everything between the address and the server. */
export class Session {
  #stopping = null; // of the run that goes on
  #selected = null; // {turn, run, cell}
  #features = { list: [], byId: new Map() };

  constructor() {
    this.kind = kindOf(about);
    this.pins = [];
    this.link = null; // the state that the address holds
    this.conversation = new Conversation();
    const lookup = (id) => this.#features.byId.get(id) ?? null;
    const changed = () => this.#changed();
    this.page = {
      get about() { return about; }, tint: () => this.toolbar.tint, pins: () => this.pins, explain: (id) => lookup(id)?.explanation ?? null,
      onSelect: (turn, run, cell) => this.#select(turn, run, cell), onDrawn: (turn) => this.#drawn(turn),
      onAgain: (turn) => this.#again(turn), onContinue: changed,
    };
    this.composer = new Composer({ about, onRun: () => this.send(), onStop: () => this.stop(), onMode: () => this.#ready(), onWrite: () => this.#ready() });
    this.toolbar = new Toolbar({ domains: about.domains, onTint: () => this.#retint(), onNew: () => this.clear(), onCopy: () => this.#copy(), onExport: () => this.#export() });
    this.transcript = new Transcript({ onExample: (text) => this.composer.fill(text) });
    this.transcript.describe({ model: about.model, chat: about.can.generate });
    this.inspector = new Inspector({ lookup, pins: () => this.pins, canSteer: about.can.steer && about.can.generate, onPin: (id) => this.pin(id), onSteer: (id) => this.steer(id) });
    this.steering = new Steering({ about, lookup, features: () => this.#features.list, onChange: () => this.#steeringChanged(), onRun: () => this.#runSteered() });
    this.tabs = new Tabs([{ name: "token", title: "Token", element: this.inspector.element }, { name: "steering", title: "Steering", element: this.steering.element }]);
    this.traces = new TraceChart({ explain: this.page.explain, onSelect: (at) => this.#flow()?.select(at), onHint: (at) => this.#flow()?.hint(at), onUnpin: (id) => this.pin(id) });
    this.element = el("div", { class: "pg" },
      el("div", { class: "pg-main" }, this.toolbar.element, el("div", { class: "pg-middle" }, this.transcript.element, this.transcript.jump), this.traces.element, this.composer.element), this.tabs.element);
    this.#ready();
  }

  /** Read the features of the bank. A page without them still shows ids. */
  async load() {
    try {
      this.#features = await catalogue(about.bank.version);
    } catch (error) {
      toast(`The explanations of the features could not be read: ${error.message}`, "error");
      return;
    }
    this.pins = this.pins.filter((id) => this.#features.byId.has(id));
    this.inspector.refresh();
    this.steering.refresh();
    this.#pinned();
  }

  /** Fill everything in as a state says. Nothing is run. linked: whether it came with a link. */
  restore(state, linked = true) {
    const messages = [...state.messages];
    const message = messages.at(-1)?.role === "user" ? messages.pop().content : "";
    this.composer.restore({ ...state, message });
    this.conversation = new Conversation(messages);
    this.transcript.showPast(messages);
    this.steering.restore(state.steering, state.compare);
    this.pins = state.pins.filter(isFeature);
    this.#pinned(state.tint);
    this.#steeringChanged();
    if (linked) this.transcript.notice(`The link has filled in what it holds. Nothing has been run: ${this.composer.mode === "chat" ? "Send" : "Read text"} does that.`);
  }

  /** Send what is written. */
  send() {
    const problem = this.composer.mode === "chat" ? this.composer.check() : null;
    if (problem !== null) {
      toast(problem, "error");
    } else if (this.composer.mode === "text") {
      this.#run({ input: this.composer.text.value, role: this.composer.role.value });
    } else {
      const content = this.composer.message.value.trim();
      this.composer.message.value = "";
      this.#run(this.#request([...this.conversation.messages, { role: "user", content }]));
    }
  }

  /** End the run that goes on. */
  stop() {
    this.#stopping?.abort();
  }

  /** Begin anew; pins, targets and settings stay. */
  clear() {
    this.stop();
    this.conversation = new Conversation();
    this.transcript.clear();
    this.#select(null, null, null);
    this.traces.show(null);
    this.toolbar.allow(false);
    this.link = null;
    setState("playground", new URLSearchParams());
    this.#ready();
    announce("Cleared.");
    (this.composer.mode === "chat" ? this.composer.message : this.composer.text).focus();
  }

  /** Pin a feature, or let it go if it is pinned. */
  pin(id) {
    if (this.pins.includes(id)) this.pins = this.pins.filter((one) => one !== id);
    else if (this.pins.length < MOST_PINS) this.pins = [...this.pins, id];
    else return void toast(`At most ${MOST_PINS} features can be pinned. Unpin one first.`);
    this.#pinned();
    this.#changed();
    announce(this.pins.includes(id) ? `${id} pinned.` : `${id} unpinned.`);
  }

  /** Add a target and show it. */
  steer(target) {
    this.steering.add(target);
    this.tabs.show("steering");
  }

  #request(messages) {
    const system = this.composer.system.value.trim();
    const { strings, compare } = this.steering;
    const said = messages.filter((message) => message.role !== "system");
    const numbers = Object.fromEntries(Object.entries(this.composer.numbers).filter(([, value]) => value !== null));
    return { messages: system ? [{ role: "system", content: system }, ...said] : said, ...numbers, ...(strings.length ? { steer: strings, compare } : {}) };
  }

  #runSteered() {
    const last = this.conversation.turns.at(-1);
    if (last) this.#run(this.#request(last.request.messages), { again: true });
    else this.send();
  }

  #again(turn) {
    if (this.#stopping) return;
    if (turn.runs.size === 0) this.transcript.drop(turn);
    this.#run(turn.request, { again: true });
  }

  async #run(request, { again = false } = {}) {
    if (this.#stopping) return;
    const stopping = new AbortController();
    this.#stopping = stopping;
    this.composer.busy(true);
    const chat = request.input === undefined;
    const earlier = chat && request.messages.filter((message) => message.role !== "system").length > 1;
    const turn = new Turn({ request, number: this.transcript.turns.length + 1, earlier, page: this.page });
    this.#select(null, null, null);
    this.transcript.add(turn);
    if (chat) this.conversation.add(turn, again);
    this.traced = null;
    this.toolbar.allow(true);
    this.#ready();
    this.#changed();
    try {
      await stream("v1/playground", { body: request, signal: stopping.signal, until: "done", onEvent: (event) => turn.on(event) });
      turn.finish();
      announce(`Run ${turn.number} is complete: ${[...turn.runs.values()].map(({ run }) => run.end?.action).join(", then ")}.`);
    } catch (error) {
      if (error.name === "AbortError") turn.stop();
      else turn.fail(error);
      // Refused before it began: what was written can be changed as well as sent again.
      if (chat && turn.runs.size === 0 && this.composer.message.value === "") this.composer.message.value = request.messages.at(-1).content;
    } finally {
      this.#stopping = null;
      this.composer.busy(false);
      this.#ready();
      this.#changed();
    }
  }

  // ---- what passes between the parts -----------------------------------------------------------------------

  #select(turn, run, cell) {
    const before = this.#selected;
    if (before && (before.turn !== turn || before.run !== run)) before.turn.runs.get(before.run.name)?.flow.select(null, { tell: false });
    for (const { flow } of before?.turn.runs.values() ?? []) flow.hint(null);
    this.#selected = cell ? { turn, run, cell } : null;
    if (!cell) {
      this.inspector.show(null);
      this.traces.select(null);
      this.tabs.open(false);
      return;
    }
    const other = beside(turn, run);
    const twin = other?.run.cellOf(cell.phase, cell.index);
    other?.flow.hint(twin ? twin.at : null);
    this.inspector.show({ run, cell, other: other?.run ?? null, limits: turn.limits, domains: turn.domains });
    this.tabs.show("token");
    this.#trace(turn, run);
    this.traces.select(cell.at);
  }

  #drawn(turn) {
    this.transcript.follow();
    if (turn !== this.transcript.turns.at(-1) || turn.runs.size === 0) return;
    if (!this.traced) this.#trace(turn, (turn.runs.get("plain") ?? turn.runs.get("steered")).run);
    else if (this.traced.turn === turn) this.traces.grow();
  }

  #trace(turn, run) {
    this.traces.show(run, beside(turn, run)?.run ?? null, turn.limits, this.#series(), this.pins);
    if (run.cells.length) this.traced = { turn, run };
  }

  #series() {
    return [...about.domains.map((domain) => `domain:${domain}`), ...this.pins.map((id) => `feature:${id}`)];
  }

  #flow() {
    return this.traced?.turn.runs.get(this.traced.run.name).flow;
  }

  #pinned(tint) {
    const before = this.toolbar.tint;
    this.toolbar.draw(this.pins, tint);
    if (before.startsWith("feature:") || before !== this.toolbar.tint) this.#retint();
    this.inspector.refresh();
    if (this.traced) this.#trace(this.traced.turn, this.traced.run);
  }

  #retint() {
    for (const turn of this.transcript.turns) turn.retint();
    this.#changed();
  }

  #steeringChanged() {
    const count = this.steering.strings?.length ?? 0;
    this.tabs.rename("steering", count ? `Steering ${count}` : "Steering");
    this.#ready();
  }

  #ready() {
    const chat = this.composer.mode === "chat";
    const last = this.conversation.turns.at(-1) ?? this.composer.message.value.trim();
    this.steering.allow(chat && Boolean(last) && this.#stopping === null, chat ? (this.#stopping ? "A run is going on." : NO_TURN) : "Steering acts on answers: change to Chat.");
  }

  // ---- the address and the file ----------------------------------------------------------------------------

  /** All that a link holds. */
  get state() {
    const last = this.conversation.turns.at(-1);
    // What was sent last stands at the end, so that whoever opens the link can send it again.
    const messages = last ? last.request.messages.filter((message) => message.role !== "system") : this.conversation.past;
    const draft = this.composer.message.value.trim();
    const { mode, role, text, system, numbers } = this.composer;
    return {
      mode, role: role.value, text: mode === "text" ? text.value : "", system: system.value,
      messages: last || !draft ? messages : [...messages, { role: "user", content: draft }], settings: numbers,
      steering: this.steering.targets, compare: this.steering.compare, pins: this.pins, tint: this.toolbar.tint,
    };
  }

  /** Keep the address up to date once something has been run. */
  #changed() {
    if (this.transcript.turns.length === 0 || !this.element.isConnected) return;
    this.link = encodeState(this.state);
    setState("playground", new URLSearchParams(this.link === null ? {} : { s: this.link }));
  }

  async #copy() {
    const link = encodeState(this.state);
    if (link === null) return void toast("This is too long for a link. Export saves the run as a file.", "error");
    this.link = link;
    setState("playground", new URLSearchParams({ s: link }));
    try {
      await navigator.clipboard.writeText(location.href);
      toast("Link copied. It holds the messages and settings; whoever opens it decides whether to run them.", "ok");
    } catch {
      toast("The browser does not let the page copy. The address above is the link.");
    }
  }

  #export() {
    const turn = this.transcript.turns.at(-1);
    if (!turn) return;
    download(`sailguard-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.json`, runFile(turn, about));
  }
}

/** What a session is built for: with another model, bank or key, it has to begin anew. */
export function kindOf({ model, bank, role, can, domains }) {
  return JSON.stringify([model, bank.version, role, can, domains]);
}

function beside(turn, run) {
  const name = run.name === "plain" ? "steered" : "plain";
  return turn.runs.get(name) ?? null;
}
