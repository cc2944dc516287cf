// The verdicts as they come, newest first: filtered, paused, at most so many kept. Rows are made once and stay.

import { scoreMeter } from "./charts.js";
import { button, debounced, el, replace, toast, unique } from "./dom.js";
import { eventDetail } from "./event_detail.js";
import { clock, fixed, hue } from "./format.js";
import { growingSelect, named } from "./rates.js";

const MOST = 500;
const PAUSE = 150; // milliseconds
const TONES = { flag: "warn", steer: "good", block: "bad" };

/**
 * The panel of the stream. filters: {action, domain, endpoint, phase, q}; `onFilter` is called when they change.
 * add(event) puts one on top when the next frame is drawn; addOlder(events) puts some below; setState(state) says how the
 * connection stands, as `liveEvents` tells it. `onRetry` connects at once.
 */
export function eventList({ domains, filters, onFilter, onRetry }) {
  let paused = false;
  let waiting = []; // newest last
  let lost = 0; // while paused
  let frame = 0;
  let flushedAt = 0;
  const rows = []; // {event, item}, newest first
  const list = el("ol", { class: "events", aria: { label: "Verdicts, newest first" } });
  const empty = el("p", { class: "empty" });
  const stateBox = el("span", { class: "stream-state", data: { state: "connecting" } });
  const note = el("div", { class: "stream-note", attrs: { role: "status" } });
  const pauseButton = button("Pause", () => setPaused(!paused), { class: "btn small", data: { act: "pause" } });
  const shown = el("span", { class: "soft" });

  const change = (name, value) => { filters[name] = value; onFilter(filters); filterAll(); };
  const selects = {
    domain: growingSelect("domain", domains, filters.domain, (value) => change("domain", value)),
    action: growingSelect("action", ["flag", "steer", "block"], filters.action, (value) => change("action", value)),
    endpoint: growingSelect("endpoint", [], filters.endpoint, (value) => change("endpoint", value)),
    phase: growingSelect("phase", ["prompt", "response"], filters.phase, (value) => change("phase", value)),
  };
  const search = el("input", { class: "input", attrs: { type: "search", placeholder: "Rule, feature or request", value: filters.q, spellcheck: false }, aria: { label: "Search rule, feature or request id" },
    on: { input: debounced(() => change("q", search.value.trim()), 150) } });

  const filterBar = el("div", { class: "filters" }, Object.values(selects).map((one) => one.control), search);
  const element = el("section", { class: "panel stream", aria: { label: "Verdicts as they come" } },
    el("header", {}, el("h2", { text: "Verdicts as they come" }), stateBox, shown, el("div", { class: "end" }, pauseButton)),
    filterBar, note, el("div", { class: "event-box" }, list, empty));

  list.addEventListener("click", (click) => {
    const head = click.target.closest(".event");
    if (head) toggle(head);
  });

  // ---- rows ----

  function add(event) {
    waiting.push(event);
    if (waiting.length > MOST) {
      waiting.shift();
      if (paused) lost += 1;
    }
    if (paused) return drawPause();
    frame ||= requestAnimationFrame(flushSoon);
  }

  /** What waits goes on top, a few times a second at most: each time the list is laid out anew. */
  function flushSoon(time) {
    frame = 0;
    if (time - flushedAt < PAUSE) frame = requestAnimationFrame(flushSoon);
    else flush();
    if (frame === 0) flushedAt = time;
  }

  function flush() {
    if (lost > 0) toast(`The newest ${MOST} verdicts are shown; ${lost} earlier ones that came while the stream was paused were not kept here.`);
    put(waiting.reverse(), true);
    waiting = [];
    lost = 0;
  }

  /** events: newest first. */
  function put(events, above) {
    const added = events.map((event) => ({ event, item: event.type === "dropped" ? droppedRow(event) : row(event) }));
    const block = document.createDocumentFragment();
    for (const one of added) {
      selects.endpoint.add(one.event.endpoint);
      selects.domain.add(one.event.domain);
      one.item.hidden = !matches(one.event);
      block.append(one.item);
    }
    if (above) {
      rows.unshift(...added);
      list.prepend(block);
    } else {
      rows.push(...added);
      list.append(block);
    }
    for (const old of rows.splice(MOST)) old.item.remove();
    drawCount();
  }

  function matches(event) {
    if (event.type === "dropped") return true;
    for (const name of ["action", "domain", "endpoint", "phase"]) if (filters[name] && event[name] !== filters[name]) return false;
    if (!filters.q) return true;
    event.searched ??= [event.rule, event.request_id, ...event.features.flatMap((hit) => [hit.id, hit.explanation])].join("\n").toLowerCase();
    return filters.q.toLowerCase().split(/\s+/).every((word) => event.searched.includes(word));
  }

  function filterAll() {
    for (const { event, item } of rows) item.hidden = !matches(event);
    drawCount();
  }

  function drawCount() {
    const visible = rows.filter((one) => !one.item.hidden && one.event.type !== "dropped").length;
    const all = rows.filter((one) => one.event.type !== "dropped").length;
    shown.textContent = all === 0 ? "" : visible === all ? `${all} shown` : `${visible} of ${all} shown`;
    empty.hidden = visible > 0;
    empty.textContent = all > 0 ? "None of them is as the filters want it." : "No verdict yet. Texts that are allowed are not listed.";
  }

  function setPaused(on) {
    paused = on;
    pauseButton.setAttribute("aria-pressed", paused);
    if (!paused) flush();
    drawPause();
    drawState();
  }

  function drawPause() {
    const count = waiting.length + lost;
    pauseButton.textContent = !paused ? "Pause" : count > 0 ? `Resume (${count} new)` : "Resume";
  }

  // ---- connection ----

  let state = { name: "connecting" };
  let failed = false;

  function setState(next) {
    state = next;
    // Trying again is part of reconnecting: the words stay until it has worked.
    failed = next.name === "waiting" || next.name === "refused" || (failed && next.name === "connecting");
    drawState();
  }

  function drawState() {
    const words = { connecting: failed ? "reconnecting" : "connecting", live: paused ? "paused" : "live", waiting: "reconnecting", refused: "not connected", off: "not available" }[state.name];
    if (stateBox.dataset.state !== words) {
      stateBox.dataset.state = words;
      replace(stateBox, el("span", { class: "dot", aria: { hidden: true } }), words);
    }
    const again = button("Connect now", onRetry, { class: "btn small" });
    if (state.name === "waiting") replace(note, el("p", { class: "callout warn" }, `${state.message} Next try in ${state.seconds} s. `, again));
    else if (state.name === "refused") replace(note, el("p", { class: "callout error" }, `${state.message} `, again));
    else if (state.name === "off") replace(note, el("p", { class: "callout", text: state.message }));
    else if (!failed) replace(note);
    pauseButton.hidden = filterBar.hidden = state.name === "off";
    if (state.name === "off") empty.hidden = true;
  }

  drawCount();
  drawState();
  return { element, add, addOlder: (events) => put(events, false), setState, stop: () => cancelAnimationFrame(frame) };
}

function row(event) {
  const top = event.features[0];
  const head = el("button", { class: "event", attrs: { type: "button" }, aria: { expanded: false } },
    el("span", { class: "time mono", text: clock(event.time) }),
    el("span", { class: `badge ${TONES[event.action] ?? ""}`, text: event.action }),
    el("span", { class: `badge ${hue(event.domain)}`, text: named(event.domain) }),
    el("span", { class: "score" }, scoreMeter(event.score, event.threshold, event.domain),
      el("span", { class: "num" }, el("span", { class: "sr", text: "score " }), fixed(event.score), el("span", { class: "soft" }, el("span", { text: " / ", aria: { hidden: true } }), el("span", { class: "sr", text: " threshold " }), fixed(event.threshold)))),
    el("span", { class: "what" },
      el("bdi", { class: "why", text: top?.explanation || top?.id || event.rule }),
      el("span", { class: "soft from" }, [event.rule, event.endpoint, event.phase, event.key_id && `by ${event.key_id}`].filter(Boolean).map((text, at) => [at > 0 ? " · " : "", el("bdi", { text })]))));
  const item = el("li", { data: { action: event.action, domain: event.domain, phase: event.phase, endpoint: event.endpoint, request: event.request_id } }, head);
  item.event = event;
  return item;
}

function droppedRow({ count }) {
  const words = `${count} ${count === 1 ? "verdict was" : "verdicts were"} dropped by the server: this page read more slowly than they came.`;
  return el("li", { class: "dropped", data: { dropped: count } }, el("p", { text: words }));
}

function toggle(head) {
  const item = head.parentElement;
  const open = head.getAttribute("aria-expanded") !== "true";
  if (open && item.childElementCount === 1) {
    const detail = eventDetail(item.event);
    detail.id = unique("event");
    head.setAttribute("aria-controls", detail.id);
    item.append(detail);
  } else if (item.childElementCount > 1) {
    item.lastElementChild.hidden = !open;
  }
  head.setAttribute("aria-expanded", open);
}
