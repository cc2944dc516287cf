// Reviewing the feature that is shown: from the keyboard, or by the buttons that say which keys do it.

import { button, el, replace, toast } from "./dom.js";
import { nameForm, noteForm, rejectForm, relabelForm, undoForm } from "./review_forms.js";
import { labelAfter, waysBack } from "./review_log.js";
import { ReviewQueue } from "./review_queue.js";

const NAME = "sailguard-reviewer";
const GO_ON = "sailguard-go-on";
const DONE = { accept: "Accepted", reject: "Rejected", relabel: "Relabelled", note: "Noted on" };
// One for the page, so that what was decided is sent, and can be taken back, after the view was left and come back to.
const session = { queue: new ReviewQueue(), given: [], reviewed: new Set(), since: null, mounted: false };
session.queue.listen(() => {
  if (session.queue.failure && !session.mounted) toast("A review could not be saved. The Explorer shows which, and can try again.", "error");
});

/** The bar under the card. `show(detail)` says what it is about; `key(event)` handles a key and says whether it was one of its own. */
export class Review {
  #detail = null;
  #form = null;
  #kept = new Map();
  #after = null;
  #host;
  #formBox = el("div", { class: "review-box" });
  #failed = el("div", { class: "review-failed" });
  #told = el("p", { class: "review-told soft", attrs: { role: "status" } });
  #buttons = el("div", { class: "review-buttons" });
  #who = button("", () => this.#open(nameForm(reviewer()), null), { class: "btn small ghost who", data: { reviewer: "" } });
  #progress = el("span", { class: "soft num", data: { progress: 0 } });
  #goOn = el("input", { attrs: { type: "checkbox", checked: localStorage.getItem(GO_ON) !== "no" }, on: { change: () => localStorage.setItem(GO_ON, this.#goOn.checked ? "yes" : "no") } });
  #stop;
  #shownFailure = null;
  #shownWaiting = 0;

  /**
   * host: {domains, concepts, onLabel(id, label, pending), onSaved(id, answer), onNext(), onGo(id, then),
   * onKeys(), onClosed()}. onGo shows a feature, and calls `then` once it is shown.
   * refused: why one cannot review here; null if one can.
   */
  constructor(host, refused) {
    this.#host = host;
    this.element = el("section", { class: "review", aria: { label: "Review" } });
    session.mounted = true;
    this.#stop = session.queue.listen((news) => this.#news(news));
    this.allow(refused);
  }

  /** Say whether one can review, and if not, why. */
  allow(refused) {
    if (refused === this.refused) return; // drawn anew, it would lose the cursor
    this.refused = refused;
    if (refused !== null) {
      replace(this.element, el("p", { class: "soft small", text: refused, data: { state: "no-review" } }));
      return;
    }
    const act = (text, letter, kind, run) => el("button", { class: `btn ${kind}`, attrs: { type: "button", "aria-keyshortcuts": letter }, on: { click: run } }, text, el("kbd", { text: letter, aria: { hidden: true } }));
    replace(this.#buttons,
      act("Accept", "a", "good", () => this.#accept()), act("Reject", "r", "bad", () => this.#openFor("reject")), act("Relabel", "e", "", () => this.#openFor("relabel")),
      act("Note", "n", "", () => this.#openFor("note")), act("Undo", "u", "ghost", () => this.#undo()),
      el("button", { class: "btn ghost keys-button", aria: { label: "Keys" }, attrs: { type: "button", "aria-keyshortcuts": "?" }, on: { click: () => this.#host.onKeys() } }, el("kbd", { text: "?", aria: { hidden: true } })));
    replace(this.element, this.#failed, this.#formBox, this.#told, el("div", { class: "review-bar" }, this.#buttons,
      el("div", { class: "review-state" }, this.#progress, el("label", { class: "check small" }, this.#goOn, "Go on by itself"), this.#who)));
    this.#draw();
  }

  /** The feature that is looked at; null while none is. What was typed for another is kept for it. */
  show(detail) {
    const same = detail?.feature.id === this.#detail?.feature.id;
    this.#detail = detail;
    if (!same) this.#close(false);
    this.#draw();
  }

  /** Whether reviews of this feature are on their way: then the label that they will leave. */
  pending(id) {
    return session.queue.pending(id);
  }

  /** Handle a key that was not typed into a field. Returns whether it was one of this bar's. */
  key(event) {
    if (event.key === "Escape" && this.#form) {
      this.#close(true);
      return true;
    }
    const run = { a: () => this.#accept(), r: () => this.#openFor("reject"), e: () => this.#openFor("relabel"), n: () => this.#openFor("note"), u: () => this.#undo() }[event.key];
    if (this.refused !== null || !run) return false;
    run();
    return true;
  }

  /** Let go. Reviews that were given are sent all the same. */
  close() {
    session.mounted = false;
    this.#stop();
  }

  // ---- giving ----------------------------------------------------------------------------------------------

  #label() {
    return this.pending(this.#detail.feature.id) ?? this.#detail.effective;
  }

  #tell(text) {
    this.#told.textContent = text;
  }

  #ready() {
    if (this.#detail === null) this.#tell("No feature is shown yet.");
    return this.#detail !== null;
  }

  #accept() {
    if (this.#ready()) this.#give({ verdict: "accept" });
  }

  /** Give a review, or first ask who gives it. form: {place, form} where it was written. */
  #give(part, form = null) {
    if (!reviewer()) {
      const { feature } = this.#detail;
      this.#open(nameForm(""), () => this.#detail?.feature.id === feature.id && this.#give(part, form));
      return;
    }
    const draft = { feature: this.#detail.feature.id, reason: "", ...part };
    const entry = this.#send(draft, this.#label(), form);
    session.given.push(entry);
    session.since ??= Date.now();
    if (form) this.#kept.delete(form.place);
    this.#close(true);
    this.#tell(`${DONE[draft.verdict]} ${draft.feature}.`);
    if (draft.verdict !== "note" && this.#goOn.checked) this.#host.onNext();
  }

  #send(part, before, form = null) {
    const draft = { ...part, reviewer: reviewer() };
    const entry = { draft, before, after: labelAfter(before, draft), form };
    this.#host.onLabel(draft.feature, entry.after, true);
    session.queue.push(entry);
    return entry;
  }

  #undo() {
    const entry = session.given.at(-1);
    if (!entry) {
      this.#tell("There is nothing to undo in this session.");
      return;
    }
    const { feature } = entry.draft;
    if (session.queue.untouched(entry)) {
      session.queue.drop(entry);
      this.#tell(`The review of ${feature} had not been sent yet: it is dropped.`);
      this.#host.onGo(feature);
      return;
    }
    const ways = waysBack(entry);
    if (ways.length === 1) this.#takeBack(entry, ways[0]);
    this.#host.onGo(feature, () => ways.length > 1 && this.#open(undoForm(feature, ways), (way) => this.#takeBack(entry, way)));
  }

  #takeBack(entry, way) {
    session.given = session.given.filter((one) => one !== entry);
    let before = this.pending(entry.draft.feature) ?? entry.after;
    for (const draft of way.drafts) before = this.#send({ reason: "", ...draft }, before).after;
    this.#close(true);
    this.#tell(`Taken back: ${entry.draft.verdict} of ${entry.draft.feature}. ${way.done}`);
  }

  // ---- forms -----------------------------------------------------------------------------------------------

  #openFor(kind) {
    if (!this.#ready()) return;
    const place = `${kind} ${this.#detail.feature.id}`;
    const make = { reject: rejectForm, note: noteForm, relabel: () => relabelForm(this.#label(), this.#host) }[kind];
    if (!this.#kept.has(place)) this.#kept.set(place, make());
    const form = this.#kept.get(place);
    this.#open(form, (read) => this.#give({ verdict: kind, ...read }, { place, form }));
  }

  /** then(read): what is done with what the form says. */
  #open(form, then) {
    this.#form = form;
    this.#after = then;
    form.element.onsubmit = (event) => {
      event.preventDefault();
      this.#submit(form);
    };
    form.element.querySelector("[data-cancel]").onclick = () => this.#close(true);
    form.element.onkeydown = (event) => {
      if (event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      this.#close(true);
    };
    replace(this.#formBox, form.element);
    form.tell("");
    form.focus();
  }

  #submit(form) {
    let read;
    try {
      read = form.read();
    } catch (error) {
      form.tell(error.message);
      return;
    }
    const then = this.#after;
    if (form.kind === "name") localStorage.setItem(NAME, read);
    this.#close(true);
    this.#draw();
    then?.(read);
  }

  /** back: put the cursor back to where the keys act. */
  #close(back) {
    const had = this.#form !== null;
    this.#form = null;
    this.#after = null;
    replace(this.#formBox);
    if (had && back) this.#host.onClosed();
  }

  // ---- news ------------------------------------------------------------------------------------------------

  #news({ saved, answer, dropped }) {
    if (saved) {
      const id = saved.draft.feature;
      if (saved.draft.verdict !== "note" && session.given.includes(saved)) session.reviewed.add(id);
      const label = this.pending(id);
      this.#host.onSaved(id, answer);
      this.#host.onLabel(id, label ?? answer.effective, label !== null);
    }
    if (dropped) {
      session.given = session.given.filter((one) => one !== dropped);
      const label = this.pending(dropped.draft.feature);
      this.#host.onLabel(dropped.draft.feature, label ?? dropped.before, label !== null);
    }
    this.#draw();
  }

  #draw() {
    const { queue, reviewed, since } = session;
    const minutes = since === null ? 0 : (Date.now() - since) / 60000;
    this.#progress.dataset.progress = reviewed.size;
    this.#progress.textContent = reviewed.size === 0 ? "" : `${reviewed.size} reviewed${reviewed.size > 1 && minutes > 0.05 ? `, ${(reviewed.size / minutes).toFixed(1)} a minute` : ""}`;
    this.#who.textContent = reviewer() ? `Reviewing as ${reviewer()}` : "Who reviews?";
    for (const one of this.#buttons.children) if (/^(Accept|Reject|Relabel|Note)/.test(one.textContent)) one.disabled = this.#detail === null;
    if (!queue.failure) replace(this.#failed);
    else if (queue.failure !== this.#shownFailure || queue.entries.length !== this.#shownWaiting) this.#drawFailure();
    this.#shownFailure = queue.failure;
    this.#shownWaiting = queue.entries.length;
  }

  #drawFailure() {
    const { queue } = session;
    const [entry, ...waiting] = queue.entries;
    const { draft } = entry;
    const hint = queue.failure.status === 403 ? " Reviews need an admin's key: choose one at the top right." : queue.failure.status === 409 ? " The bank's folder must be one that the server can write." : "";
    const edit = entry.form ? button("Edit it", () => this.#edit(entry), { class: "btn small" }) : null;
    replace(this.#failed, el("div", { class: "callout error", attrs: { role: "alert" }, data: { state: "failed", waiting: waiting.length } },
      el("p", {}, el("b", {}, `Not saved: ${draft.verdict} of ${draft.feature}. `), el("bdi", { text: queue.failure.message }), hint,
        waiting.length ? ` ${waiting.length} more ${waiting.length === 1 ? "waits" : "wait"} behind it.` : ""),
      draft.reason ? el("p", { class: "soft small", text: draft.reason, attrs: { dir: "auto" } }) : null,
      el("div", { class: "row" }, button("Try again", () => queue.retry(), { class: "btn small" }), edit, button("Discard", () => queue.drop(entry), { class: "btn small ghost" }))));
  }

  #edit(entry) {
    this.#kept.set(entry.form.place, entry.form.form);
    session.queue.drop(entry);
    this.#host.onGo(entry.draft.feature, () => this.#openFor(entry.draft.verdict));
  }
}

/** Who reviews, as was said before in this browser; empty if nobody has. */
function reviewer() {
  return localStorage.getItem(NAME) ?? "";
}
