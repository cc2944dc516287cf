// Making and changing the page's elements. Text always becomes text nodes: what a model or a bank says is never markup.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element. `options`: class, text, title, on (event name to listener), aria and data (name to value), attrs, props.
 * Children are elements, strings, arrays of them; null, undefined and false are left out.
 */
export function el(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  fill(element, options, children);
  return element;
}

/** The same for SVG; every option but `class`, `text`, `on`, `aria` and `data` goes into `attrs`. */
export function svg(tag, options = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  fill(element, options, children);
  return element;
}

function fill(element, options, children) {
  if (options.class) element.setAttribute("class", options.class);
  if (options.title) element.setAttribute("title", options.title);
  for (const [name, value] of Object.entries(options.attrs ?? {})) {
    if (/^on|^style$|^srcdoc$/i.test(name)) throw new Error(`attribute ${name} is not set here`);
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  for (const [name, value] of Object.entries(options.aria ?? {})) {
    if (value !== null && value !== undefined) element.setAttribute(`aria-${name}`, String(value));
  }
  for (const [name, value] of Object.entries(options.data ?? {})) element.dataset[name] = String(value);
  for (const [name, value] of Object.entries(options.props ?? {})) element[name] = value;
  for (const [name, listener] of Object.entries(options.on ?? {})) element.addEventListener(name, listener);
  if (options.text !== undefined && options.text !== null) element.append(String(options.text));
  add(element, children);
}

function add(element, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) add(element, child);
    else element.append(child);
  }
}

/** Put `children` in the place of what `node` holds. */
export function replace(node, ...children) {
  node.replaceChildren();
  add(node, children);
  return node;
}

/** A button. options: class, text, title, on, aria, pressed; `onClick` is its listener. */
export function button(text, onClick, options = {}) {
  return el("button", { ...options, text, attrs: { type: "button", ...options.attrs }, on: { ...options.on, click: onClick } });
}

/** A field with its label above. `hint` stands below. */
export function field(label, control, hint) {
  if (!control.id) control.id = unique("field");
  const note = hint ? el("small", { class: "soft", text: hint, attrs: { id: `${control.id}-hint` } }) : null;
  if (note) control.setAttribute("aria-describedby", note.id);
  return el("div", { class: "field" }, el("label", { text: label, attrs: { for: control.id } }), control, note);
}

/** A select of [value, label] pairs. */
export function select(options, chosen, onChange, attrs = {}) {
  const control = el("select", { class: "input", attrs, on: { change: () => onChange?.(control.value) } });
  for (const [value, label] of options) control.append(el("option", { text: label, attrs: { value, selected: value === chosen } }));
  return control;
}

let count = 0;

/** An id that no other element has. */
export function unique(prefix) {
  count += 1;
  return `${prefix}-${count}`;
}

/** Say something to a screen reader. */
export function announce(text) {
  const live = document.getElementById("live");
  live.textContent = "";
  requestAnimationFrame(() => { live.textContent = text; });
}

/** A message that goes by itself, an error only when it is closed. kind: info, ok or error. */
export function toast(text, kind = "info") {
  const box = document.getElementById("toasts");
  const note = el("div", { class: `toast ${kind}`, attrs: { role: kind === "error" ? "alert" : "status" } },
    el("span", { text, attrs: { dir: "auto" } }), button("×", () => note.remove(), { class: "btn ghost small", aria: { label: "Close message" } }));
  while (box.childElementCount > 3) box.firstElementChild.remove();
  box.append(note);
  if (kind !== "error") setTimeout(() => note.remove(), 6000);
  return note;
}

/** Calls `work` once `ms` have passed without a further call. */
export function debounced(work, ms) {
  let timer = 0;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...args), ms);
  };
}
