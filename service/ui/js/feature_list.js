// The list of features: rows in chunks that are made as one scrolls, one of them selected.

import { button, el, replace, unique } from "./dom.js";
import { readable } from "./card_text.js";
import { fixed, hue } from "./format.js";

const CHUNK = 40;
const PAGE = 6;
const MARKS = { accepted: "✓", rejected: "✕", unreviewed: "" };

/** A listbox of feature summaries. onSelect(id) is called when the user chooses one, with `open` true if by pointer or Enter. */
export class FeatureList {
  #features = [];
  #places = new Map();
  #pending = new Map();
  #made = 0;
  #selected = null;
  #prefix = unique("feature");
  #box = el("div", { class: "rows", aria: { label: "Features" }, attrs: { role: "listbox", tabindex: 0 } });
  #watcher;
  #onSelect;

  constructor({ onSelect }) {
    this.#onSelect = onSelect;
    this.element = el("div", { class: "rows-box" }, this.#box);
    this.#box.addEventListener("click", (event) => this.#clicked(event));
    this.#box.addEventListener("keydown", (event) => this.#pressed(event));
    // The last chunk is far longer than the screen: as it comes into view, there is time to make the next.
    this.#watcher = new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && this.#makeChunk());
  }

  /** The ids in order. */
  get ids() {
    return this.#features.map((feature) => feature.id);
  }

  /** Whether the list has that feature. */
  has(id) {
    return this.#places.has(id);
  }

  /** Whether the cursor is in the list. */
  get focused() {
    return document.activeElement === this.#box;
  }

  /** The id `step` rows from `id`, or null beyond the ends; from nowhere, the first. */
  neighbour(id, step) {
    const place = this.#places.get(id);
    return this.#features[place === undefined ? 0 : place + step]?.id ?? null;
  }

  /** While a search is under way, what was there stays, dimmed. */
  busy(is) {
    this.#box.setAttribute("aria-busy", String(is));
    if (is && this.#features.length === 0 && !this.element.querySelector("[data-state]")) this.#instead("loading", el("span", { class: "spinner", aria: { hidden: true } }), el("p", { text: "Loading features…" }));
  }

  /** Show these features. `nothing` stands there if there are none. */
  show(features, nothing) {
    this.busy(false);
    this.#features = features;
    this.#places = new Map(features.map((feature, place) => [feature.id, place]));
    this.#made = 0;
    replace(this.#box);
    this.element.scrollTop = 0;
    if (features.length === 0) {
      this.#instead("empty", nothing);
      return;
    }
    this.#instead(null);
    this.#makeChunk();
    if (this.#selected) this.select(this.#selected);
  }

  /** Say why there is no list. */
  fail(message, again) {
    this.busy(false);
    this.#features = [];
    this.#places.clear();
    replace(this.#box);
    this.#instead("error", el("p", { text: message, attrs: { dir: "auto", role: "alert" } }), button("Try again", again, { class: "btn" }));
  }

  /** Mark `id` as the selected row, make it if need be, and bring it into view. */
  select(id) {
    this.#row(this.#selected)?.setAttribute("aria-selected", "false");
    this.#selected = id;
    const place = this.#places.get(id);
    if (place === undefined) {
      this.#box.removeAttribute("aria-activedescendant");
      return;
    }
    while (this.#made <= place) this.#makeChunk();
    const row = this.#row(id);
    row.setAttribute("aria-selected", "true");
    this.#box.setAttribute("aria-activedescendant", row.id);
    this.#reveal(id, 3);
  }

  /** Chunks that were never on the screen have a guessed height until they are: after a far jump it takes a few frames to get there. */
  #reveal(id, times) {
    if (id !== this.#selected || times === 0) return;
    this.#row(id)?.scrollIntoView({ block: "nearest" });
    requestAnimationFrame(() => this.#reveal(id, times - 1));
  }

  /** Put the cursor into the list. */
  focus() {
    this.#box.focus({ preventScroll: true });
    this.#row(this.#selected)?.scrollIntoView({ block: "nearest" });
  }

  /** What holds of a feature now; pending: it is not saved yet. */
  update(id, label, pending) {
    if (pending) this.#pending.set(id, label);
    else this.#pending.delete(id);
    const place = this.#places.get(id);
    if (place === undefined) return;
    if (!pending) this.#features[place] = { ...this.#features[place], domains: label.domains, concepts: label.concepts, explanation: label.explanation, status: label.status };
    this.#row(id)?.replaceWith(this.#makeRow(this.#features[place], place));
  }

  /** Let go of everything. */
  close() {
    this.#watcher.disconnect();
  }

  #row(id) {
    return id === null ? null : document.getElementById(`${this.#prefix}-${id}`);
  }

  #instead(state, ...children) {
    this.element.querySelector("[data-state]")?.remove();
    this.#box.hidden = state !== null;
    if (state) this.element.append(el("div", { class: "empty", data: { state } }, children));
  }

  #makeChunk() {
    if (this.#made >= this.#features.length) return;
    const part = this.#features.slice(this.#made, this.#made + CHUNK);
    const chunk = el("div", { class: "rows-chunk", attrs: { role: "presentation" } }, part.map((feature, index) => this.#makeRow(feature, this.#made + index)));
    this.#made += part.length;
    this.#box.append(chunk);
    this.#watcher.disconnect();
    if (this.#made < this.#features.length) this.#watcher.observe(chunk);
  }

  #makeRow(feature, place) {
    const pending = this.#pending.get(feature.id);
    const { domains, explanation, status } = pending ?? feature;
    const text = readable(explanation) || "No explanation";
    const state = pending ? `${status}, being saved` : status;
    return el("div", {
      class: "f-row",
      attrs: { role: "option", id: `${this.#prefix}-${feature.id}` },
      aria: { selected: feature.id === this.#selected, setsize: this.#features.length, posinset: place + 1 },
      data: { feature: feature.id, status, ...(pending ? { pending: "" } : {}) },
    },
    el("div", { class: "f-head" },
      el("span", { class: "f-id mono", text: feature.id }),
      feature.direction ? el("span", { class: "f-kind", text: "direction" }) : null,
      el("span", { class: "f-mark", text: MARKS[status], title: state, aria: { hidden: true } }), el("span", { class: "sr", text: state })),
    el("p", { class: "f-text", text, attrs: { dir: "auto" } }),
    el("div", { class: "f-foot" },
      el("span", { class: "f-domains" }, domains.map((domain) => el("span", { class: `f-domain ${hue(domain)}`, text: domain }))),
      el("span", { class: "f-bars" }, bar("AUROC", feature.auroc, feature.auroc === null ? 0 : 2 * feature.auroc - 1), bar("fidelity", feature.fidelity, feature.fidelity))));
  }

  #clicked(event) {
    const row = event.target.closest("[data-feature]");
    if (row) this.#onSelect(row.dataset.feature, true);
  }

  #pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || this.#features.length === 0) return;
    const last = this.#features.length - 1;
    const place = this.#places.get(this.#selected) ?? -1;
    const wanted = { ArrowDown: place + 1, ArrowUp: place - 1, PageDown: place + PAGE, PageUp: place - PAGE, Home: 0, End: last }[event.key];
    if (event.key === "Enter" && place >= 0) this.#onSelect(this.#selected, true);
    else if (wanted !== undefined) this.#onSelect(this.#features[Math.max(0, Math.min(last, wanted))].id, false);
    else return;
    event.preventDefault();
  }
}

/** A small bar with its number; share: of the bar that is filled. */
function bar(name, value, share) {
  const meter = el("span", { class: "meter", aria: { hidden: true } }, el("span"));
  meter.style.setProperty("--w", `${100 * Math.max(0, Math.min(1, share ?? 0))}%`);
  return el("span", { class: "f-bar", title: name === "AUROC" ? "AUROC; the bar begins at 0.5" : "Fidelity of the explanation" }, el("span", { class: "soft", text: name }), meter, el("span", { class: "num", text: fixed(value) }));
}
