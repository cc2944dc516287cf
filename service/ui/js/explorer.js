// Explorer: find features, read their cards, review them.

import { about, onAbout, setState } from "./app.js";
import { get } from "./api.js";
import { makeCard } from "./card.js";
import { Details } from "./details.js";
import { announce, button, el, replace } from "./dom.js";
import { isCommand, showKeys } from "./explorer_keys.js";
import { Filters } from "./explorer_filters.js";
import { FeatureList } from "./feature_list.js";
import { whole } from "./format.js";
import { Review } from "./review.js";

const PAGE = 1000;
const PATIENCE = 150; // before what was shown is dimmed: most cards come sooner
const NARROW = matchMedia("(max-width: 62rem)");
let explorer = null;

/** The view. */
export const view = {
  name: "explorer",
  title: "Explorer",
  mount(root, state) { explorer = new Explorer(root, state); },
  unmount() {
    explorer?.close();
    explorer = null;
  },
};

class Explorer {
  #life = new AbortController();
  #details = new Details(this.#life.signal);
  #bank = about.bank.content_hash;
  #id = null;
  #chosen = false; // by the user; else the first match is shown, and is not in the address
  #asking = null;
  #waiting = 0;
  #count = el("p", { class: "soft" });
  #card = el("div", { class: "card-box" });

  constructor(root, state) {
    const domains = about.domains;
    this.root = root;
    this.filters = new Filters({ bank: about.bank, domains, state, onChange: () => this.#search() });
    this.list = new FeatureList({ onSelect: (id, open) => this.#choose(id, { open }) });
    this.review = new Review({
      domains, concepts: about.bank.concepts,
      onLabel: (id, label, pending) => this.list.update(id, label, pending),
      onSaved: (id, answer) => this.#saved(id, answer),
      onNext: () => this.#step(1),
      onGo: (id, then) => this.#choose(id, { open: true }).then((shown) => shown && then?.()),
      onKeys: showKeys,
      onClosed: () => this.#rest(),
    }, refusal());
    this.pane = el("section", { class: "panel pane", aria: { label: "Feature" } },
      button("Back to the list", () => this.#back(), { class: "btn small pane-back" }), this.#card, this.review.element);
    root.append(this.filters.element, el("div", { class: "explore" }, el("section", { class: "panel list", aria: { label: "Matches" } }, el("div", { class: "list-head" }, this.#count, this.filters.tools), this.list.element), this.pane));
    const { signal } = this.#life;
    document.addEventListener("keydown", (event) => this.#key(event), { signal });
    signal.addEventListener("abort", onAbout(() => this.#news()));
    const wanted = state.get("feature");
    if (wanted) this.#choose(wanted, { open: true, quiet: true });
    else this.#hint();
    this.#search();
  }

  close() {
    this.#life.abort();
    this.#asking?.abort();
    clearTimeout(this.#waiting);
    this.review.close();
    this.list.close();
  }

  // ---- list ------------------------------------------------------------------------------------------------

  async #search() {
    if (this.#life.signal.aborted) return; // typed just before the view was left
    this.#asking?.abort();
    const asking = new AbortController();
    this.#asking = asking;
    this.#save();
    this.list.busy(true);
    try {
      const { found, total } = await matches(this.filters.values(), asking.signal);
      if (asking.signal.aborted) return; // a later one is on its way
      this.#shown(found, total);
    } catch (error) {
      if (asking.signal.aborted) return;
      this.#tell(0, "");
      this.list.fail(error.message, () => this.#search());
    }
  }

  #shown(found, total) {
    const narrowed = this.filters.narrowed;
    this.list.show(found, el("div", {}, el("p", { text: narrowed ? "No feature matches." : "The bank holds no features." }),
      narrowed ? button("Clear filters", () => this.filters.clear(), { class: "btn small" }) : null));
    this.#tell(found.length, narrowed ? `${whole(found.length)} ${found.length === 1 ? "match" : "matches"}` : `${whole(total)} features`);
    if (narrowed) announce(this.#count.textContent);
    for (const feature of found) {
      const label = this.review.pending(feature.id);
      if (label) this.list.update(feature.id, label, true);
    }
    if (!this.#chosen && !NARROW.matches) {
      if (found.length) this.#choose(found[0].id, { own: true });
      else this.#nothing();
    }
    this.#ahead();
  }

  #tell(count, text) {
    this.#count.textContent = text;
    this.#count.dataset.count = count;
  }

  #step(step) {
    const next = this.list.neighbour(this.#id, step);
    if (next === null) {
      announce(step > 0 ? "This is the last of the list." : "This is the first of the list.");
      return;
    }
    if (!this.list.focused) announce(next); // else the list itself says it
    this.#choose(next, {});
  }

  // ---- card ------------------------------------------------------------------------------------------------

  /**
   * Show a feature's card. open: over the list, on narrow screens. own: the user did not choose it. Resolves with whether it is shown.
   */
  async #choose(id, { open = false, own = false, quiet = false }) {
    if (!own) this.#chosen = true;
    if (open) this.#cover();
    this.list.select(id);
    const again = id === this.#id && this.#card.querySelector("[data-card]") !== null;
    this.#id = id;
    this.#save();
    if (!again) {
      this.review.show(null);
      const ready = await this.#load(id);
      if (!ready) return false;
    }
    if (open && !quiet && NARROW.matches) this.#card.querySelector("h2")?.focus();
    return true;
  }

  /** On narrow screens the card comes in the place of the list. */
  #cover() {
    if (!this.root.classList.contains("card-open") && NARROW.matches) scrollTo(0, 0);
    this.root.classList.add("card-open");
  }

  async #load(id) {
    clearTimeout(this.#waiting);
    this.#waiting = setTimeout(() => {
      this.pane.setAttribute("aria-busy", "true");
      if (!this.#card.hasChildNodes() || this.#card.querySelector("[data-state]")) this.#state("loading", el("span", { class: "spinner", aria: { hidden: true } }), el("p", { text: `Loading ${id}…` }));
    }, PATIENCE);
    let detail = null;
    let failed = null;
    try {
      detail = await this.#details.get(id);
    } catch (error) {
      failed = error;
    }
    if (this.#life.signal.aborted || id !== this.#id) return false;
    clearTimeout(this.#waiting);
    this.pane.removeAttribute("aria-busy");
    if (failed) this.#state("error", el("p", { text: failed.message, attrs: { role: "alert", dir: "auto" } }), button("Try again", () => this.#choose(id, { open: true }), { class: "btn" }));
    else if (detail === null) this.#state("unknown", el("h2", { text: "No such feature" }), el("p", {}, "The bank ", el("bdi", { text: about.bank.version }), " has no feature ", el("bdi", { class: "mono", text: id.slice(0, 60) }), "."), button("Show the list", () => this.#back(), { class: "btn" }));
    else this.#draw(detail);
    return detail !== null;
  }

  #draw(detail) {
    replace(this.#card, makeCard(detail, { domains: about.domains, onFeature: (id) => this.#choose(id, { open: true }) }));
    this.#card.scrollTop = 0;
    this.review.show(detail);
    this.#ahead();
  }

  #state(state, ...children) {
    replace(this.#card, el("div", { class: "empty", data: { state } }, children));
    this.review.show(null);
  }

  #hint() {
    this.#state("none", el("p", { text: "Choose a feature from the list." }));
  }

  #nothing() {
    this.#id = null;
    this.#hint();
  }

  #ahead() {
    if (this.list.has(this.#id)) this.#details.ahead(this.list.neighbour(this.#id, 1));
  }

  async #saved(id, answer) {
    await this.#details.reviewed(id, answer);
    if (this.#life.signal.aborted || id !== this.#id) return;
    const detail = await this.#details.get(id).catch(() => null);
    if (detail === null || id !== this.#id) return;
    const place = this.#card.scrollTop;
    this.#draw(detail);
    this.#card.scrollTop = place;
  }

  #back() {
    const id = this.#id;
    this.root.classList.remove("card-open");
    this.#chosen = false;
    if (this.list.has(id)) this.list.select(id);
    else this.#nothing();
    this.#save();
    if (!this.#id && !NARROW.matches && this.list.ids.length) this.#choose(this.list.ids[0], { own: true });
    this.list.focus();
  }

  // ---- keys, address, server ---------------------------------------------------------------------------------

  #key(event) {
    if (!isCommand(event)) return;
    const loose = event.target === document.body || event.target.id === "main";
    if (event.key === "j" || (loose && event.key === "ArrowDown")) this.#step(1);
    else if (event.key === "k" || (loose && event.key === "ArrowUp")) this.#step(-1);
    else if (event.key === "/") this.filters.focus();
    else if (event.key === "?") showKeys();
    else if (!this.review.key(event)) return;
    event.preventDefault();
  }

  /** Put the cursor where keys act: after a form is closed, it would be nowhere. */
  #rest() {
    if (NARROW.matches) this.#card.querySelector("h2")?.focus({ preventScroll: true });
    else this.list.focus();
  }

  #save() {
    setState("explorer", new URLSearchParams({ ...this.filters.values(), ...(this.#chosen && this.#id ? { feature: this.#id } : {}) }));
  }

  #news() {
    this.review.allow(refusal());
    if (about.bank.content_hash === this.#bank) return;
    this.#bank = about.bank.content_hash;
    this.#details.forget();
    const id = this.#id;
    this.#id = null;
    if (id) this.#choose(id, { own: !this.#chosen });
    this.#search();
  }
}

/** Why one cannot review here; null if one can. */
function refusal() {
  if (about.can.review) return null;
  if (!about.keys) return "Reviewing takes an admin's key, and this server has no keys: `sailguard keys new` makes them.";
  if (about.role !== "admin") return "Reviewing takes an admin's key: choose one at the top right.";
  return "Reviews cannot be kept: the server may not write the bank's folder. Serve a copy of the bank that it may write.";
}

/** All features that match, in order. Rows of a kind are picked here: the server has no filter for them. */
async function matches({ rows, ...filters }, signal) {
  const list = [];
  for (;;) {
    const page = await get("v1/features", { ...filters, limit: PAGE, offset: list.length }, { signal });
    list.push(...page.data);
    if (list.length >= page.total || page.data.length === 0) {
      return { found: rows ? list.filter((feature) => (feature.direction !== "") === (rows === "direction")) : list, total: page.total };
    }
  }
}
