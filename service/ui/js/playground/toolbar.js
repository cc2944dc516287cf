// The line above the transcript: what the tint shows and what it means, a new start, the link, the file.

import { button, el, replace, select } from "../dom.js";
import { legend } from "./tint.js";

/** The toolbar. page: {domains, onTint(tint), onNew(), onCopy(), onExport()}. */
export class Toolbar {
  constructor(page) {
    this.page = page;
    this.tint = "lead";
    this.choice = el("span");
    this.meaning = el("span", { class: "pg-meaning" });
    this.save = button("Export", () => page.onExport(), { class: "btn ghost small", title: "Save the last run as a JSON file" });
    this.element = el("div", { class: "pg-toolbar" },
      el("label", { class: "row pg-tint" }, el("span", { class: "soft", text: "Tint" }), this.choice), this.meaning,
      el("span", { class: "row pg-acts" },
        button("New", () => page.onNew(), { class: "btn ghost small", title: "Clear the transcript and begin anew" }),
        button("Copy link", () => page.onCopy(), { class: "btn ghost small", title: "A link that fills in what is here; it runs nothing by itself" }), this.save));
    this.draw([]);
    this.allow(false);
  }

  /** Offer the pinned features too. A tint that is gone gives way to the leading domain. */
  draw(pins, tint = this.tint) {
    const options = [["lead", "leading domain"], ...this.page.domains.map((domain) => [`domain:${domain}`, domain]), ...pins.map((id) => [`feature:${id}`, id])];
    this.tint = options.some(([value]) => value === tint) ? tint : "lead";
    replace(this.choice, select(options, this.tint, (value) => { this.tint = value; this.#explain(pins); this.page.onTint(value); }, { class: "input pg-tint-choice", "aria-label": "Tint shows" }));
    this.#explain(pins);
  }

  /** Whether there is a run to save. */
  allow(on) {
    this.save.disabled = !on;
  }

  #explain(pins) {
    const box = legend(this.tint, this.page.domains);
    if (this.tint.startsWith("feature:")) box.classList.add(`p${pins.indexOf(this.tint.slice(8))}`);
    replace(this.meaning, box);
  }
}
