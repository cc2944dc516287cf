// The panels at the side, of which one is shown; on a narrow screen they are a sheet at the foot that opens and shuts.

import { button, el } from "../dom.js";

/** Tabs over panels. panels: [{name, title, element}]. */
export class Tabs {
  constructor(panels) {
    this.tabs = panels.map(({ name, title }, i) => el("button", { class: "pg-tab", text: title, attrs: { type: "button", role: "tab", id: `pg-tab-${name}` }, aria: { controls: `pg-${name}` }, data: { name },
      on: { click: () => this.#clicked(name), keydown: (event) => this.#pressed(event, i) } }));
    this.panels = panels.map(({ name, element }) => el("div", { class: "body", attrs: { id: `pg-${name}`, role: "tabpanel", tabindex: "0" }, aria: { labelledby: `pg-tab-${name}` } }, element));
    this.close = button("Close", () => this.open(false), { class: "btn ghost small pg-close", aria: { label: "Close details" } });
    this.element = el("div", { class: "panel pg-side" }, el("div", { class: "pg-tabs", attrs: { role: "tablist" }, aria: { label: "Details" } }, this.tabs), this.close, el("div", { class: "pg-panels" }, this.panels));
    this.show(panels[0].name, false);
  }

  /** Show a panel. open: also open the sheet of a narrow screen. */
  show(name, open = true) {
    this.shown = name;
    for (const [i, tab] of this.tabs.entries()) {
      const on = tab.dataset.name === name;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      this.panels[i].hidden = !on;
    }
    if (open) this.open(true);
  }

  /** Open or shut the sheet. On a wide screen the panels are always there. */
  open(on) {
    this.element.classList.toggle("open", on);
  }

  /** Give a tab another title. */
  rename(name, title) {
    this.tabs.find((tab) => tab.dataset.name === name).textContent = title;
  }

  #clicked(name) {
    const again = this.shown === name && this.element.classList.contains("open");
    this.show(name, false);
    this.open(!again);
  }

  #pressed(event, i) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const tab = this.tabs[(i + step + this.tabs.length) % this.tabs.length];
    this.show(tab.dataset.name, false);
    tab.focus();
  }
}
