// What surrounds the views: which one is shown, the server's state, the theme and the key.

import { get, key, onKeyWanted } from "./api.js";
import { announce, button, el, field, replace } from "./dom.js";

const THEME = "sailguard-theme";
const THEMES = ["auto", "light", "dark"];
const MARKS = { auto: "◐", light: "☀", dark: "☾" };

/** What /v1/about said last; views may read it while they are mounted. */
export let about = null;

const listeners = new Set();
let shown = null;
let problem = null;

/** Call `listener` whenever /v1/about says something new. Returns what ends that. */
export function onAbout(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/** Ask the server again what it is. Raises ApiError. */
export async function refreshAbout() {
  const found = await get("v1/about");
  const news = JSON.stringify(found) !== JSON.stringify(about);
  about = found;
  problem = null;
  drawStatus();
  if (news) for (const listener of listeners) listener(found);
  return found;
}

/**
 * The view's own part of the address. Replaces it in place: the back button goes between views. A view that is no longer
 * shown, and says something late, does not change the address of the one that is.
 */
export function setState(name, params) {
  if (shown !== null && shown.name !== name) return;
  const query = params.toString();
  history.replaceState(null, "", `#/${name}${query ? `?${query}` : ""}`);
}

/** Start the page with its views; the first of them is shown where the address names none. */
export async function start(views) {
  setTheme(localStorage.getItem(THEME) ?? "auto");
  onKeyWanted(askForKey);
  const main = document.getElementById("main");
  document.getElementById("skip").addEventListener("click", () => main.focus());
  replace(document.getElementById("views"), views.map((view) => el("a", { text: view.title, attrs: { href: `#/${view.name}` }, data: { view: view.name } })));
  drawStatus();
  await connect(main);
  addEventListener("hashchange", () => show(views, main));
  show(views, main);
  setInterval(poll, 15000);
}

async function connect(main) {
  for (;;) {
    try {
      await refreshAbout();
      return;
    } catch (error) {
      problem = error;
      drawStatus();
      const again = el("div", { class: "callout error" }, el("p", { text: error.message, attrs: { dir: "auto" } }));
      replace(main, again);
      await new Promise((resolve) => {
        again.append(button("Try again", resolve, { class: "btn" }));
        if (error.status === 503) setTimeout(resolve, 2000); // the model is still loading
      });
      replace(main, el("p", { class: "loading", text: "Loading…", attrs: { role: "status" } }));
    }
  }
}

async function poll() {
  if (document.hidden) return;
  try {
    await refreshAbout();
  } catch (error) {
    problem = error;
    drawStatus();
  }
}

function show(views, main) {
  const [name, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const view = views.find((one) => one.name === name) ?? views[0];
  shown?.unmount();
  shown = view;
  for (const link of document.querySelectorAll("#views a")) {
    if (link.dataset.view === view.name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${view.title} · sailguard`;
  const root = el("div", { class: `view view-${view.name}` }, el("h1", { class: "sr", text: view.title }));
  replace(main, root);
  view.mount(root, new URLSearchParams(query));
  announce(`${view.title}`);
}

// ---- header ------------------------------------------------------------------------------------------------

function drawStatus() {
  const box = document.getElementById("status");
  const state = problem ? "bad" : about ? "good" : "wait";
  const words = problem ? "not reachable" : about ? about.model : "connecting";
  const detail = about ? `model ${about.model}, bank ${about.bank.version}, policy ${about.policy.version}` : "";
  const pill = el("span", { class: `pill ${state}`, title: problem?.message ?? detail },
    el("span", { class: "dot" }), el("bdi", { text: words }),
    about && !problem ? el("span", { class: "soft wide-only" }, el("bdi", { text: about.bank.version })) : null);
  const theme = document.documentElement.dataset.theme ?? "auto";
  const themeButton = button(MARKS[theme], () => { setTheme(THEMES[(THEMES.indexOf(theme) + 1) % 3]); drawStatus(); announceTheme(); },
    { class: "btn ghost icon", title: `Theme: ${theme}`, aria: { label: `Theme: ${theme}. Change` } });
  const who = about?.keys ? button(about.key_id ? `${about.key_id}` : "Key", () => askForKey(false).then((given) => given && refreshAbout().then(() => dispatchEvent(new Event("hashchange")))),
    { class: "btn ghost small", title: about.role ? `Role: ${about.role}. Use another key` : "Use a key" }) : null;
  replace(box, pill, who, themeButton);
}

function announceTheme() {
  announce(`Theme: ${document.documentElement.dataset.theme}`);
  document.querySelector("#status .icon")?.focus();
}

function setTheme(theme) {
  const known = THEMES.includes(theme) ? theme : "auto";
  document.documentElement.dataset.theme = known;
  localStorage.setItem(THEME, known);
}

// ---- key ---------------------------------------------------------------------------------------------------

let asking = null;

/** A dialog for the key. Resolves with whether one was given. wrong: the last one was not accepted. */
function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    const input = el("input", { class: "input", attrs: { type: "password", autocomplete: "off", spellcheck: false, required: true } });
    const dialog = el("dialog", { class: "dialog", aria: { label: "API key" } },
      el("form", { attrs: { method: "dialog" } },
        el("h2", { text: "This server asks for a key" }),
        wrong ? el("p", { class: "callout error", text: "The key was not accepted.", attrs: { role: "alert" } }) : null,
        field("API key", input, "It stays in this tab and goes to this server alone. Reviews, steering and comparisons need an admin's."),
        el("div", { class: "row end" },
          button("Cancel", () => dialog.close(), { class: "btn ghost" }),
          el("button", { class: "btn primary", text: "Use it", attrs: { type: "submit", value: "ok" } }))));
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "ok" && input.value.trim() !== "";
      if (given) key.set(input.value.trim());
      dialog.remove();
      asking = null;
      resolve(given);
    });
    document.body.append(dialog);
    dialog.showModal();
    input.focus();
  });
  return asking;
}
