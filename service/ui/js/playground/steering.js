// The steering panel: what is to be held, pushed or switched off while the model answers.

import { announce, button, el, replace, select } from "../dom.js";
import { fixed, hue } from "../format.js";
import { TargetSearch } from "./target_search.js";

const HOLD = { min: 0, max: 5 };
const ADD = { min: -5, max: 5 };
const STEP = 0.25;
const MOST = 12;

/** The strings that a request brings: `TARGET=ablate`, `TARGET=clamp:VALUE` or `TARGET=STRENGTH`. */
export function steerString({ target, op, value }) {
  if (op === "add") return `${target}=${value}`;
  return value === 0 ? `${target}=ablate` : `${target}=clamp:${value}`;
}

/** The panel. page: {about, features(), lookup(id), onChange(), onRun()}. */
export class Steering {
  constructor(page) {
    this.page = page;
    this.targets = []; // {target, op, value, on}
    this.compare = true;
    this.element = el("div", { class: "pg-steering" });
    this.can = page.about.can.steer && page.about.can.generate;
    if (!this.can) {
      const why = page.about.can.generate ? "Steering changes what the model does, so it needs an admin's key. The button at the top right takes one." : "This server does not generate, so there is nothing to steer.";
      this.element.append(el("div", { class: "empty" }, el("p", { text: why })));
      return;
    }
    const { domains, bank } = page.about;
    this.search = new TargetSearch({ domains, concepts: bank.concepts, features: page.features }, (target) => this.add(target, true));
    this.rows = el("div", { class: "pg-targets" });
    this.check = el("input", { attrs: { type: "checkbox", checked: true }, on: { change: () => { this.compare = this.check.checked; page.onChange(); } } });
    this.run = button("Run again with steering", () => page.onRun(), { class: "btn primary" });
    this.hint = el("small", { class: "soft" });
    this.element.append(
      el("p", { class: "soft", text: "Hold features at a level, or push along their directions, while the answer is written. Nothing runs until you say so." }),
      el("p", { class: "soft", text: "The guard reads a layer before that layer is steered, so a held feature still shows its own reading; the effect is in later layers and in the words." }),
      this.search.element, this.rows,
      el("label", { class: "check" }, this.check, el("span", { text: "Compare with an unsteered run" })),
      el("div", { class: "pg-steer-run" }, this.run, this.hint));
    this.#draw();
  }

  /** What a request gets: strings for the targets in use. */
  get strings() {
    return this.targets.filter((one) => one.on && !(one.op === "add" && one.value === 0)).map(steerString);
  }

  /** Add a target, held at its 99.9th percentile. */
  add(target, focus = false) {
    if (!this.can) return;
    if (this.targets.some((one) => one.target === target)) {
      announce(`${target} is there already.`);
    } else if (this.targets.length >= MOST) {
      announce(`At most ${MOST} targets.`);
    } else {
      this.targets.push({ target, op: "hold", value: 1, on: true });
      announce(`${target} added.`);
    }
    this.#draw();
    this.page.onChange();
    if (focus) this.rows.querySelector(`[data-target="${CSS.escape(target)}"] input[type=range]`)?.focus();
  }

  /** Take over what a link says. */
  restore(targets, compare) {
    if (!this.can) return;
    this.targets = targets.slice(0, MOST).map((one) => {
      const { min, max } = one.op === "add" ? ADD : HOLD;
      return { ...one, value: Math.min(max, Math.max(min, one.value)) };
    });
    this.compare = compare;
    this.check.checked = compare;
    this.#draw();
  }

  /** Whether there is something that can be run again. why: what has to be done before, if not. */
  allow(ready, why = "") {
    if (!this.can) return;
    this.run.disabled = !ready || this.strings.length === 0;
    this.hint.textContent = this.strings.length === 0 ? "Add a target first." : ready ? "" : why;
    this.ready = [ready, why];
  }

  /** Labels have come. */
  refresh() {
    if (this.can) this.#draw();
  }

  #draw() {
    replace(this.rows, this.targets.map((one) => this.#row(one)));
    this.allow(...(this.ready ?? [false, ""]));
  }

  #row(one) {
    const { target } = one;
    const feature = this.page.lookup(target);
    const domain = feature?.domains[0] ?? target.split("/")[0];
    const said = el("output", { class: "num pg-target-value" });
    const range = one.op === "add" ? ADD : HOLD;
    const slider = el("input", { attrs: { type: "range", min: range.min, max: range.max, step: STEP, value: one.value, list: this.#ticks(one.op) }, aria: { label: `Value for ${target}` } });
    const box = el("div", { class: `pg-target ${hue(domain)}`, data: { target } });
    const told = () => {
      said.textContent = words(one);
      slider.setAttribute("aria-valuetext", words(one));
      box.dataset.steer = steerString(one);
      box.classList.toggle("off", !one.on);
    };
    slider.addEventListener("input", () => { one.value = Number(slider.value); told(); this.#changed(); });
    const use = el("input", { attrs: { type: "checkbox", checked: one.on, "aria-label": `Use ${target}` }, on: { change: () => { one.on = use.checked; told(); this.#changed(); } } });
    const how = select([["hold", "hold"], ["add", "add"]], one.op, (op) => {
      Object.assign(one, { op, value: op === "add" ? 1 : Math.max(0, one.value) });
      this.#draw();
      this.#changed();
      this.rows.querySelector(`[data-target="${CSS.escape(target)}"] select`)?.focus();
    }, { "aria-label": `How ${target} is steered`, title: "hold: at a multiple of the 99.9th percentile; add: push by a strength" });
    const remove = button("×", () => {
      this.targets = this.targets.filter((other) => other !== one);
      this.#draw();
      this.#changed();
      this.search.input.focus();
    }, { class: "btn ghost small", aria: { label: `Remove ${target}` } });
    told();
    box.append(
      el("div", { class: "pg-target-head" }, use, el("span", { class: `pg-key ${feature ? "mono" : ""} grow`, text: target }), said, remove),
      feature?.explanation ? el("p", { class: "soft pg-clamp", text: feature.explanation, title: feature.explanation, attrs: { dir: "auto" } }) : "",
      el("div", { class: "pg-target-set" }, el("div", { class: "pg-slider" }, slider, el("div", { class: "pg-ticks", aria: { hidden: true } }, scale(one.op))), how));
    return box;
  }

  #ticks(op) {
    const id = `pg-ticks-${op}`;
    if (!this.element.querySelector(`#${id}`)) {
      const { min, max } = op === "add" ? ADD : HOLD;
      const marks = Array.from({ length: max - min + 1 }, (_, i) => el("option", { attrs: { value: min + i } }));
      this.element.append(el("datalist", { attrs: { id } }, marks));
    }
    return id;
  }

  #changed() {
    this.allow(...(this.ready ?? [false, ""]));
    this.page.onChange();
  }
}

function words({ op, value }) {
  if (op === "add") return `${value > 0 ? "+" : ""}${fixed(value)}`;
  return value === 0 ? "ablate" : `${fixed(value)}×`;
}

function scale(op) {
  const labels = op === "add" ? ["−5", "0", "+5"] : ["ablate", "1×", "2×", "3×", "4×", "5×"];
  return labels.map((text) => el("span", { text }));
}
