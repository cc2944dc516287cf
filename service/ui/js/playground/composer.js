// Where a message is written or a text is pasted, and how the model is to answer.

import { button, el, field, replace, select } from "../dom.js";

const ROLES = [["prompt", "a prompt"], ["response", "a response"], ["passage", "a passage"]];
const SETTINGS = {
  max_tokens: { label: "Max tokens", min: 1, step: 1, start: 256 },
  temperature: { label: "Temperature", min: 0, max: 2, step: 0.01, start: 0 },
  top_p: { label: "Top-p", min: 0, max: 1, step: 0.01, start: 1 },
  seed: { label: "Seed", min: 0, step: 1, start: null, hint: "any, if empty" },
};

/** The form at the foot. page: {about, onRun(), onStop(), onMode(), onWrite()}. */
export class Composer {
  constructor(page) {
    this.page = page;
    const { can, role } = page.about;
    this.modes = role === "reader" ? [] : [can.generate ? "chat" : null, can.trace ? "text" : null].filter(Boolean);
    this.mode = this.modes[0] ?? "text";
    this.message = el("textarea", { class: "input pg-message", attrs: { rows: 2, dir: "auto", placeholder: "Write a message" }, aria: { label: "Message" },
      on: { keydown: (event) => this.#pressed(event), input: () => { this.#grow(this.message); page.onWrite(); } } });
    this.text = el("textarea", { class: "input pg-message pg-paste", attrs: { rows: 5, dir: "auto", placeholder: "Paste a text" }, aria: { label: "Text" },
      on: { keydown: (event) => this.#pressed(event) } });
    this.role = select(ROLES, "passage", null, { "aria-label": "Read as" });
    this.system = el("textarea", { class: "input", attrs: { rows: 2, dir: "auto" } });
    this.inputs = Object.fromEntries(Object.entries(SETTINGS).map(([name, how]) => [name, this.#number(name, how)]));
    this.settings = el("div", { class: "pg-settings", attrs: { id: "pg-settings" } }, field("System prompt", this.system),
      el("div", { class: "pg-numbers" }, Object.entries(SETTINGS).map(([name, how]) => field(how.label, this.inputs[name], how.hint))));
    this.settings.hidden = true;
    this.toggle = button("Settings", () => this.#open(this.settings.hidden), { class: "btn ghost small", aria: { expanded: false, controls: "pg-settings" } });
    this.go = el("button", { class: "btn primary", attrs: { type: "submit" } });
    this.stop = button("Stop", () => page.onStop(), { class: "btn" });
    this.hint = el("small", { class: "soft wide-only" });
    this.as = el("label", { class: "row pg-as" }, el("span", { class: "soft", text: "Read as" }), this.role);
    this.switch = el("div", { class: "seg", attrs: { role: "group" }, aria: { label: "Mode" } });
    this.element = el("form", { class: "panel pg-composer", attrs: { novalidate: true }, aria: { label: "Composer" }, on: { submit: (event) => { event.preventDefault(); this.#submit(); } } },
      this.settings, this.message, this.text,
      el("div", { class: "pg-composer-foot" }, this.switch, this.toggle, this.as, this.hint, el("span", { class: "row pg-send" }, this.stop, this.go)));
    this.busy(false);
    this.setMode(this.mode);
    if (this.modes.length > 0) return;
    for (const control of [this.text, this.role, this.go]) control.disabled = true;
    this.text.placeholder = "This key may look, but not send anything. The button at the top right takes another one.";
  }

  /** Go over to `chat` or `text`, if the server can do that. */
  setMode(mode) {
    if (this.modes.includes(mode)) this.mode = mode;
    const chat = this.mode === "chat";
    replace(this.switch, this.modes.map((one) => button(one === "chat" ? "Chat" : "Text", () => { this.setMode(one); this.page.onMode(); }, { class: "btn small", aria: { pressed: one === this.mode } })));
    this.message.hidden = !chat;
    this.text.hidden = chat;
    this.toggle.hidden = !chat;
    this.as.hidden = chat;
    if (!chat) this.#open(false);
    this.go.textContent = chat ? "Send" : "Read text";
    this.hint.textContent = chat ? "Enter sends, Shift+Enter starts a line" : "Ctrl+Enter reads it";
  }

  /** While a run goes on, it can be stopped, and no other begins. */
  busy(on) {
    this.stop.hidden = !on;
    this.go.hidden = on;
  }

  /** Put a text where it can be looked over before it is sent. */
  fill(text) {
    const box = this.mode === "chat" ? this.message : this.text;
    box.value = text;
    this.#grow(this.message);
    this.page.onWrite();
    box.focus();
  }

  /** What is written, or "". */
  get written() {
    return (this.mode === "chat" ? this.message : this.text).value;
  }

  /** {max_tokens, temperature, top_p, seed}; null for what is left empty. */
  get numbers() {
    return Object.fromEntries(Object.entries(this.inputs).map(([name, input]) => [name, input.value === "" ? null : Number(input.value)]));
  }

  /** The first setting that cannot be, said in words and shown; null if all can. */
  check() {
    const wrong = Object.entries(this.inputs).find(([, input]) => !input.checkValidity());
    if (!wrong) return null;
    this.#open(true);
    wrong[1].focus();
    return `${SETTINGS[wrong[0]].label}: ${wrong[1].validationMessage}`;
  }

  /** Take over what a link says. */
  restore({ mode, role, text, system, settings, message }) {
    this.text.value = text;
    this.system.value = system;
    this.role.value = role;
    this.message.value = message;
    for (const [name, input] of Object.entries(this.inputs)) {
      if (settings[name] !== undefined) input.value = settings[name];
    }
    this.setMode(mode);
    this.#open(this.mode === "chat" && system !== "");
  }

  #number(name, { min, max, step, start }) {
    const limit = this.page.about.limits?.max_new_tokens;
    const most = name === "max_tokens" ? limit : max;
    const value = name === "max_tokens" && limit ? Math.min(start, limit) : start;
    return el("input", { class: "input", attrs: { type: "number", min, max: most, step, value, inputmode: step === 1 ? "numeric" : "decimal" } });
  }

  #open(on) {
    this.settings.hidden = !on;
    this.toggle.setAttribute("aria-expanded", String(on));
  }

  #submit() {
    if (this.stop.hidden && this.written.trim() !== "") this.page.onRun();
  }

  #pressed(event) {
    // While an input method composes, Enter chooses among its suggestions. 229 is how some browsers say so.
    if (event.key !== "Enter" || event.isComposing || event.keyCode === 229) return;
    const sends = this.mode === "chat" ? !event.shiftKey : event.ctrlKey || event.metaKey;
    if (!sends) return;
    event.preventDefault();
    this.#submit();
  }

  #grow(box) {
    const lines = box.value.split("\n").length;
    box.rows = Math.min(8, Math.max(2, lines));
  }
}
