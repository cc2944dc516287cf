// The filters above the list of features: what they hold is the query of `GET /v1/features`, and lies in the address.

import { button, debounced, el, replace, select, unique } from "./dom.js";

const SEARCH_DELAY = 150;
const LEAST_AUROC = 0.5;
const ANY = ["", "Any"];
const CHOICES = {
  status: [ANY, ["unreviewed", "Unreviewed"], ["accepted", "Accepted"], ["rejected", "Rejected"]],
  admitted: [ANY, ["true", "Admitted"], ["false", "Not admitted"]],
  rows: [ANY, ["sae", "SAE features"], ["direction", "Directions"]],
  sort: [["", "Best match first"], ["auroc", "By AUROC"], ["fidelity", "By fidelity"], ["density", "By density"], ["id", "By id"]],
};
const NAMES = ["q", "domain", "concept", "layer", "status", "min_auroc", "admitted", "rows", "sort"];

/** The bar of filters. `element` goes on the page; `onChange` is called when a query is due. */
export class Filters {
  #controls = {};
  #usedConcept = "";
  #concepts;
  #shownAuroc = el("output", { class: "num" });
  #clear = button("Clear filters", () => this.clear(), { class: "btn small ghost" });
  #more = button("Filters", () => this.#fold(), { class: "btn small filters-more", aria: { expanded: false } });
  #onChange;

  /** bank: of /v1/about. domains: in their order. state: of the address. */
  constructor({ bank, domains, state, onChange }) {
    this.#onChange = onChange;
    this.#concepts = bank.concepts;
    const now = () => this.#changed();
    const soon = debounced(now, SEARCH_DELAY);
    const list = el("datalist", { attrs: { id: unique("concepts") } });
    const c = this.#controls;
    c.q = el("input", { class: "input", attrs: { type: "search", maxlength: 500, placeholder: "Words, “phrases”, ids, tokens…", autocomplete: "off", spellcheck: false, "aria-keyshortcuts": "/" }, on: { input: soon } });
    c.domain = select([ANY, ...domains.map((name) => [name, name])], "", () => this.#domainChanged(list));
    c.concept = el("input", { class: "input", attrs: { list: list.id, placeholder: "Any", autocomplete: "off", spellcheck: false }, on: { input: () => this.#conceptTyped(false), change: () => this.#conceptTyped(true) } });
    c.layer = select([ANY, ...bank.layers.map((layer) => [String(layer), String(layer)])], "", now);
    for (const name of ["status", "admitted", "rows", "sort"]) c[name] = select(CHOICES[name], "", now);
    c.min_auroc = el("input", { attrs: { type: "range", min: LEAST_AUROC, max: 1, step: 0.01, value: LEAST_AUROC }, on: { input: () => { this.#showAuroc(); soon(); } } });
    this.#restore(state);
    this.#fillConcepts(list);
    this.#showAuroc();
    this.#mark();
    this.element = el("form", { class: "panel finder", aria: { label: "Find features" }, attrs: { role: "search" }, on: { submit: (event) => event.preventDefault() } },
      labelled("Search", c.q, "f-search"), this.#more,
      el("div", { class: "filters-rest", attrs: { id: unique("filters") } },
        labelled("Domain", c.domain), labelled("Concept", c.concept, "f-concept", list), labelled("Layer", c.layer, "f-layer"), labelled("Status", c.status),
        labelled("Admitted", c.admitted), labelled("Rows", c.rows), labelled("Least AUROC", c.min_auroc, "f-auroc", this.#shownAuroc)));
    /** What stands above the list: what sets all back, and the order. */
    this.tools = [this.#clear, labelled("Sort by", c.sort, "f-sort")];
    this.#more.setAttribute("aria-controls", this.element.querySelector(".filters-rest").id);
  }

  /** What is set, by name: as it stands in the address. A concept counts once it is one of the bank's. */
  values() {
    const found = {};
    for (const name of NAMES) {
      const value = this.#controls[name].value.trim();
      const set = name === "min_auroc" ? Number(value) > LEAST_AUROC : name === "concept" ? this.#concepts.includes(value) : value !== "";
      if (set) found[name] = value;
    }
    return found;
  }

  /** Whether anything but the order is set. */
  get narrowed() {
    return Object.keys(this.values()).some((name) => name !== "sort");
  }

  /** Put the cursor into the search field. */
  focus() {
    this.#controls.q.focus();
    this.#controls.q.select();
  }

  /** Set everything back. */
  clear() {
    for (const name of NAMES) this.#controls[name].value = name === "min_auroc" ? LEAST_AUROC : "";
    this.#checkConcept(false);
    this.#fillConcepts(this.element.querySelector("datalist"));
    this.#showAuroc();
    this.#changed();
    this.#controls.q.focus();
  }

  #restore(state) {
    for (const name of NAMES) {
      const value = state.get(name);
      if (value === null) continue;
      this.#controls[name].value = value;
      if (this.#controls[name].selectedIndex === -1) this.#controls[name].value = ""; // not one of the choices
    }
    if (!this.#concepts.includes(this.#controls.concept.value)) this.#controls.concept.value = "";
    this.#usedConcept = this.#controls.concept.value;
  }

  #changed() {
    this.#mark();
    this.#onChange();
  }

  #mark() {
    const set = Object.keys(this.values()).filter((name) => name !== "q");
    for (const name of NAMES) this.#controls[name].classList.toggle("set", set.includes(name));
    this.#clear.hidden = Object.keys(this.values()).length === 0;
    this.#more.textContent = set.length ? `Filters (${set.length})` : "Filters";
  }

  #fold() {
    const open = this.element.classList.toggle("open");
    this.#more.setAttribute("aria-expanded", String(open));
  }

  #domainChanged(list) {
    const domain = this.#controls.domain.value;
    if (domain && !this.#controls.concept.value.startsWith(`${domain}/`)) this.#controls.concept.value = "";
    this.#fillConcepts(list);
    this.#checkConcept(false);
    this.#changed();
  }

  #fillConcepts(list) {
    const domain = this.#controls.domain.value;
    replace(list, this.#concepts.filter((name) => !domain || name.startsWith(`${domain}/`)).map((name) => el("option", { attrs: { value: name } })));
  }

  #conceptTyped(left) {
    const before = this.#usedConcept;
    if (this.#checkConcept(left) && this.#usedConcept !== before) this.#changed();
  }

  /** Whether the concept is one, or none is asked for. left: the field was left, so that another text is marked as wrong. */
  #checkConcept(left) {
    const control = this.#controls.concept;
    const text = control.value.trim();
    const known = text === "" || this.#concepts.includes(text);
    if (known) {
      this.#usedConcept = text;
      control.removeAttribute("aria-invalid");
    } else if (left) control.setAttribute("aria-invalid", "true");
    control.labels[0].textContent = known || !left ? "Concept" : "Concept: none such";
    return known;
  }

  #showAuroc() {
    const value = Number(this.#controls.min_auroc.value);
    const text = value > LEAST_AUROC ? value.toFixed(2) : "any";
    this.#shownAuroc.textContent = text;
    this.#controls.min_auroc.setAttribute("aria-valuetext", text);
  }
}

function labelled(label, control, name = "", extra = null) {
  control.id = unique("filter");
  if (extra?.tagName === "OUTPUT") extra.setAttribute("for", control.id);
  return el("div", { class: `field ${name}` }, el("label", { text: label, attrs: { for: control.id } }), control, extra);
}
