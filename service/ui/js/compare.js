// Compare: the same texts judged by two banks or policies, before one of them is promoted.

import { get, post } from "./api.js";
import { about, setState } from "./app.js";
import { PASTED, sideBody, sideForm } from "./compare_sides.js";
import { textsForm } from "./compare_texts.js";
import { comparisonPanel } from "./comparison_table.js";
import { announce, button, el, replace } from "./dom.js";

const BATCH = 25;

// Kept while the page is open, and never in the address: texts and policies may be confidential.
const memory = {
  sides: { left: { bank: "", policy: "", yaml: "" }, right: { bank: "", policy: "", yaml: "" } },
  texts: { text: "", split: "line", role: "prompt", file: null },
  filters: { changed: false, domain: "", open: new Set() },
  result: null,
  begun: false,
};

let shown = null;

export const view = {
  name: "compare",
  title: "Compare",
  mount(root, state) { shown = new AbortController(); open(root, state, shown.signal); },
  unmount() { shown?.abort(); shown = null; },
};

async function open(root, state, signal) {
  const place = el("div", { class: "stack" });
  root.append(place);
  for (;;) {
    replace(place, el("p", { class: "loading", text: "Reading what can be compared…", attrs: { role: "status" } }));
    try {
      const choices = await get("v1/compare", {}, { signal });
      if (signal.aborted) return;
      settle(choices, state);
      build(place, choices, signal);
      return;
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 403) {
        replace(place, el("div", { class: "callout warn" }, el("h2", { text: "An admin key is needed" }),
          el("p", { text: `Comparing loads other banks and policies, which only an admin key may do${about.role ? `; this one is a ${about.role}’s` : ""}. Use another key at the top of the page.` })));
        return;
      }
      await new Promise((resolve) => {
        replace(place, el("div", { class: "callout error", attrs: { role: "alert" } }, el("p", { text: error.message, attrs: { dir: "auto" } }), button("Try again", resolve, { class: "btn" })));
      });
    }
  }
}

/** What is chosen first: what the address says, else what is in use against something else. */
function settle({ banks, policies }, state) {
  const current = (list) => (list.find((one) => one.current) ?? list[0])?.id ?? "";
  const other = (list) => list.find((one) => !one.current)?.id ?? current(list);
  for (const [name, side] of Object.entries(memory.sides)) {
    const first = !memory.begun;
    side.bank = state.get(`${name}-bank`) ?? (side.bank || current(banks));
    const policy = name === "right" && first && !state.has("right-bank") ? other(policies) : current(policies);
    side.policy = state.get(`${name}-policy`) ?? (side.policy || policy);
  }
  if (["prompt", "response", "passage"].includes(state.get("role"))) memory.texts.role = state.get("role");
  memory.begun = true;
}

function build(place, choices, signal) {
  const { sides, texts } = memory;
  let running = null; // AbortController of the run
  const outcome = el("div", { class: "stack" });
  const problem = el("div", { class: "callout error", attrs: { role: "alert", hidden: true } });
  const forms = {
    left: sideForm({ name: "left", title: "Side A", side: sides.left, choices, onChange: changed }),
    right: sideForm({ name: "right", title: "Side B", side: sides.right, choices, onChange: changed }),
  };
  const swap = button("⇄", () => {
    const left = { ...sides.left };
    Object.assign(sides.left, sides.right);
    Object.assign(sides.right, left);
    for (const form of Object.values(forms)) { form.clear(); form.draw(); }
    changed();
    announce("The sides are swapped");
  }, { class: "btn icon swap", title: "Swap the sides", aria: { label: "Swap sides" } });
  const input = textsForm({ memory: texts, onChange: changed });
  const go = button("Compare", () => start(false), { class: "btn primary", data: { act: "compare" } });
  const more = button("Continue", () => start(true), { class: "btn", attrs: { hidden: true } });
  const bar = el("progress", { attrs: { max: 1, value: 0 }, aria: { label: "Texts compared" } });
  const barText = el("span", { class: "soft" });
  const cancel = button("Cancel", () => running?.abort(), { class: "btn small" });
  const progress = el("div", { class: "row progress", attrs: { hidden: true } }, bar, barText, cancel);

  replace(place,
    el("div", { class: "compare-sides" }, forms.left.element, swap, forms.right.element), input.element,
    el("div", { class: "row run-row" }, go, more, progress), problem, outcome);
  changed();
  draw();

  function changed() {
    const count = input.texts().length;
    go.textContent = count === 0 ? "Compare" : count === 1 ? "Compare 1 text" : `Compare ${count} texts`;
    go.disabled = running !== null;
    const rest = memory.result === null ? 0 : memory.result.total - memory.result.rows.length;
    more.hidden = running !== null || rest === 0 || memory.result.asked !== asked();
    more.textContent = `Continue with the other ${rest}`;
    const params = new URLSearchParams();
    for (const [name, side] of Object.entries(sides)) {
      params.set(`${name}-bank`, side.bank);
      if (side.policy !== PASTED) params.set(`${name}-policy`, side.policy);
    }
    params.set("role", texts.role);
    if (!signal.aborted) setState("compare", params);
  }

  /** What the result depends on, to know whether it can be continued. */
  function asked() {
    return JSON.stringify([sideBody(sides.left), sideBody(sides.right), texts.role, input.texts()]);
  }

  async function start(further) {
    problem.hidden = true;
    input.clear();
    for (const form of Object.values(forms)) form.clear();
    const all = input.texts();
    if (all.length === 0) return input.fail("There is no text to compare yet.");
    const empty = Object.keys(sides).filter((name) => sides[name].policy === PASTED && sides[name].yaml.trim() === "");
    if (empty.length > 0) return empty.forEach((name) => forms[name].fail("There is no policy here yet."));
    running = new AbortController();
    const stop = AbortSignal.any([signal, running.signal]);
    const body = { left: sideBody(sides.left), right: sideBody(sides.right), role: texts.role };
    if (!further) {
      memory.result = null;
      memory.filters.open.clear();
    }
    const result = memory.result ?? { asked: asked(), total: all.length, role: texts.role, rows: [], domains: [], left: null, right: null, summary: { changed: 0, newly_blocked: 0, newly_allowed: 0, mean_score_change: {} } };
    let size = BATCH;
    progress.hidden = false;
    changed();
    if (!further) replace(outcome);
    try {
      while (result.rows.length < all.length) {
        const done = result.rows.length;
        bar.value = done / all.length;
        barText.textContent = `${done} of ${all.length}`;
        const batch = all.slice(done, done + size);
        try {
          take(result, await post("v1/compare", { ...body, texts: batch }, { signal: stop }), batch);
        } catch (error) {
          if (error.code !== "request_timeout" || size === 1) throw error;
          size = Math.ceil(size / 5); // long texts: fewer of them fit into the server's time
          continue;
        }
        memory.result = result;
        draw();
      }
      announce(`${result.summary.changed} of ${result.rows.length} texts change`);
    } catch (error) {
      if (!stop.aborted) tell(error, result.rows.length);
      else if (!signal.aborted) announce(`Cancelled after ${result.rows.length} texts`);
    }
    running = null;
    progress.hidden = true;
    if (signal.aborted) return;
    changed();
    draw();
  }

  function tell(error, done) {
    const name = /^(left|right)\b/.exec(error.param ?? "")?.[1];
    const numbered = /^texts\D*(\d+)/.exec(error.param ?? "");
    const pasted = Object.keys(sides).filter((one) => sides[one].policy === PASTED);
    if (name) forms[name].fail(error.message);
    else if (numbered) input.fail(`Text ${done + Number(numbered[1]) + 1}: ${error.message}`);
    else if (error.param?.startsWith("texts")) input.fail(error.message);
    else if (error.status === 400 && pasted.length === 1) forms[pasted[0]].fail(error.message);
    else {
      replace(problem, el("p", { text: error.status === 403 ? `An admin key is needed. ${error.message}` : error.message, attrs: { dir: "auto" } }), button("Try again", () => start(done > 0), { class: "btn small" }));
      problem.hidden = false;
    }
  }

  function draw() {
    const { result } = memory;
    if (result === null) {
      if (running === null) replace(outcome, el("p", { class: "empty", text: "What both sides do with each text will stand here. Nothing of the running server changes, and nothing is audited." }));
      return;
    }
    const focused = outcome.contains(document.activeElement) ? document.activeElement.closest("tr")?.dataset.index : undefined;
    const { element } = comparisonPanel({ result, filters: memory.filters, complete: result.rows.length === result.total });
    replace(outcome, result.reloaded ? el("p", { class: "callout warn", text: "A bank or policy changed on the server while this ran: the texts were not all judged by the same." }) : null, element);
    if (focused !== undefined) element.querySelector(`tr[data-index="${focused}"] .opener`)?.focus();
  }
}

/** Add what a batch's answer says to `result`. */
function take(result, answer, batch) {
  const done = result.rows.length;
  const versions = JSON.stringify([answer.left, answer.right]);
  if (result.left !== null && versions !== JSON.stringify([result.left, result.right])) result.reloaded = true;
  const known = new Set(answer.results.flatMap((one) => [...Object.keys(one.left.scores), ...Object.keys(one.right.scores)]));
  Object.assign(result, { left: answer.left, right: answer.right, domains: [...new Set([...result.domains, ...about.domains.filter((domain) => known.has(domain)), ...known])] });
  for (const one of answer.results) result.rows.push({ ...one, index: done + one.index, text: batch[one.index] });
  const { summary } = result;
  for (const name of ["changed", "newly_blocked", "newly_allowed"]) summary[name] += answer.summary[name];
  for (const [domain, change] of Object.entries(answer.summary.mean_score_change)) {
    summary.mean_score_change[domain] = ((summary.mean_score_change[domain] ?? 0) * done + change * batch.length) / (done + batch.length);
  }
}
