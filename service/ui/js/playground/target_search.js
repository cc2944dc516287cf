// Finding something to steer: a domain, a concept or a feature.

import { el, replace, unique } from "../dom.js";
import { hue } from "../format.js";

const MOST = 30;

/** A combobox over all that can be steered. page: {domains, concepts, features() → summaries}; onChoose(target). */
export class TargetSearch {
  #found = [];
  #active = -1;

  constructor(page, onChoose) {
    Object.assign(this, { page, onChoose });
    const id = unique("targets");
    this.list = el("ul", { class: "pg-options", attrs: { id, role: "listbox" }, aria: { label: "Targets" },
      on: {
        // The input keeps the focus: a press that took it away would close the list before the click.
        pointerdown: (event) => event.preventDefault(),
        click: (event) => this.#choose(this.#found[Number(event.target.closest("[data-at]")?.dataset.at)]),
      } });
    this.list.hidden = true;
    this.input = el("input", { class: "input", attrs: { type: "text", role: "combobox", autocomplete: "off", spellcheck: false, placeholder: "Domain, concept, feature or words of one" },
      aria: { expanded: false, controls: id, autocomplete: "list", label: "Add a target" },
      on: { input: () => this.#search(), focus: () => this.#search(), blur: () => this.#close(), keydown: (event) => this.#pressed(event) } });
    this.element = el("div", { class: "pg-search" }, this.input, this.list);
  }

  #search() {
    const words = this.input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (text) => words.every((word) => text.toLowerCase().includes(word));
    const { domains, concepts } = this.page;
    const features = words.length === 0 ? [] : this.page.features().filter((one) => fits(`${one.id} ${one.explanation ?? ""} ${one.concepts.join(" ")}`));
    // Features of a kind that was asked for by its id or words come strongest first.
    features.sort((a, b) => (b.auroc ?? 0) - (a.auroc ?? 0));
    this.#found = [
      ...domains.filter(fits).map((target) => ({ target, kind: "domain", domain: target })),
      ...concepts.filter(fits).map((target) => ({ target, kind: "concept", domain: target.split("/")[0] })),
      ...features.map((one) => ({ target: one.id, kind: "feature", domain: one.domains[0], words: one.explanation })),
    ].slice(0, MOST);
    this.#active = -1;
    this.#draw();
  }

  #draw() {
    replace(this.list, this.#found.map(({ target, kind, domain, words }, at) => el("li", { data: { at }, attrs: { role: "option", id: `${this.list.id}-${at}` }, aria: { selected: at === this.#active } },
      el("span", { class: `pg-key ${hue(domain)} ${kind === "domain" ? "" : "mono"}`, text: target }), el("span", { class: "soft", text: kind }),
      words ? el("span", { class: "soft pg-option-words", text: words, attrs: { dir: "auto" } }) : null)),
    this.#found.length ? null : el("li", { class: "soft", text: "Nothing fits.", attrs: { role: "option" }, aria: { disabled: true, selected: false } }));
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
    this.#mark();
  }

  #mark() {
    for (const option of this.list.children) {
      const on = option.dataset.at !== undefined && Number(option.dataset.at) === this.#active;
      option.setAttribute("aria-selected", String(on));
      if (on) option.scrollIntoView({ block: "nearest" });
    }
    if (this.#active >= 0) this.input.setAttribute("aria-activedescendant", `${this.list.id}-${this.#active}`);
    else this.input.removeAttribute("aria-activedescendant");
  }

  #pressed(event) {
    if (event.isComposing) return;
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      if (this.list.hidden) this.#search();
      const count = this.#found.length;
      if (count) this.#active = (this.#active + step + count + (this.#active < 0 && step < 0 ? 1 : 0)) % count;
      this.#mark();
    } else if (event.key === "Enter") {
      if (!this.list.hidden) this.#choose(this.#found[Math.max(0, this.#active)]);
    } else if (event.key === "Escape" && !this.list.hidden) {
      this.#close();
    } else {
      return;
    }
    event.preventDefault();
  }

  #choose(found) {
    if (!found) return;
    this.input.value = "";
    this.#close();
    this.onChoose(found.target);
  }

  #close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
  }
}
