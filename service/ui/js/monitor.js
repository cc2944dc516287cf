// Monitor: what the guard judges now. Counts of /v1/stats, verdicts of /v1/events, and what the audit knows of before.

import { get } from "./api.js";
import { about, refreshAbout, setState } from "./app.js";
import { ACTIONS } from "./charts.js";
import { announce, button, el } from "./dom.js";
import { eventList } from "./event_list.js";
import { clock } from "./format.js";
import { liveEvents } from "./live_events.js";
import { RateStore } from "./rate_store.js";
import { ratesPanel } from "./rates.js";
import { statTiles } from "./stat_tiles.js";
import { topFeatures } from "./top_features.js";

const POLL = 2000;
const HISTORY = 30; // seconds between two looks into the audit
const PAGES = 4; // of the audit's entries: for the list, and for the minutes before the page was opened
const FILTERS = ["action", "domain", "endpoint", "phase", "q"];

let shown = null;

export const view = {
  name: "monitor",
  title: "Monitor",
  mount(root, state) { shown = monitor(root, state); },
  unmount() { shown?.stop(); shown = null; },
};

function monitor(root, state) {
  const ended = new AbortController();
  const { signal } = ended;
  const { can } = about;
  const filters = Object.fromEntries(FILTERS.map((name) => [name, state.get(name) ?? ""]));
  const store = new RateStore(about.domains);
  const seen = new Set(); // of the events: one may come from the stream and from the audit
  let minutes = [5, 15, 60].includes(Number(state.get("range"))) ? Number(state.get("range")) : 15;
  let offset = 0; // of the server's clock, in seconds
  let last = null; // the last stats
  let historyAt = -Infinity;
  let auditTold = false;
  let dirty = true;
  const now = () => Date.now() / 1000 + offset;
  const opened = clock(new Date());
  const since = () => (store.history === null || minutes === 5 && !can.audit ? `since this page was opened at ${opened}` : "from the audit and as they come");

  // ---- what is seen ----

  const notices = el("div", { class: "stack notices", attrs: { hidden: true } });
  const problem = el("div", { class: "callout error", attrs: { hidden: true, role: "alert" } });
  const tiles = statTiles();
  const rates = ratesPanel({ store, now, since, minutes, onRange: (chosen) => { minutes = chosen; keep(); } });
  const list = eventList({ domains: about.domains, filters, onFilter: keep, onRetry: () => live?.retry() });
  const top = topFeatures();
  const knowsFeatures = can.events || can.audit;
  root.append(el("div", { class: "stack" }, problem, notices, tiles.element, rates.element,
    knowsFeatures ? el("div", { class: "columns" }, list.element, el("div", { class: "side" }, top.element)) : list.element));

  function keep() {
    const params = new URLSearchParams();
    if (minutes !== 15) params.set("range", minutes);
    for (const name of FILTERS) if (filters[name]) params.set(name, filters[name]);
    setState("monitor", params);
  }

  function tell(words) {
    const note = el("div", { class: "callout warn row between" }, el("span", { text: words }),
      button("Close", () => { note.remove(); notices.hidden = notices.childElementCount === 0; }, { class: "btn ghost small" }));
    while (notices.childElementCount > 2) notices.lastElementChild.remove();
    notices.prepend(note);
    notices.hidden = false;
    announce(words);
  }

  // ---- events ----

  /** Whether `event` is new here; then it is counted. */
  function take(event) {
    const name = [event.request_id, event.phase, event.choice, event.token_index, event.rule, event.domain].join("\n");
    if (seen.has(name)) return false;
    seen.add(name);
    if (seen.size > 4000) seen.delete(seen.values().next().value);
    const time = Date.parse(event.time) / 1000;
    store.add(event.domain, event.action, time);
    top.count(event, time);
    dirty = true;
    return true;
  }

  function onEvent(event) {
    if (event.type === "dropped" || (event.type === "verdict" && take(event))) list.add(event);
  }

  /** What the audit has of the last minutes: below the list when the view opens, above it after a break. */
  async function readAudit(first) {
    const from = now() - 300;
    let before = null;
    for (let page = 0; page < PAGES; page += 1) {
      const { data } = await get("admin/audit", { limit: 100, before, since: first ? null : from }, { signal });
      const fresh = data.filter((entry) => entry.action !== "allow").map(({ text, ...event }) => event).filter(take);
      if (first) list.addOlder(fresh);
      else fresh.reverse().forEach(list.add);
      if (data.length < 100 || Date.parse(data.at(-1).time) / 1000 < from) return;
      before = data.at(-1).id;
    }
  }

  async function readHistory() {
    const asked = now();
    historyAt = asked;
    const history = await get("admin/audit/history", { minutes: 60 }, { signal });
    store.setHistory(history, asked);
    const all = Object.values(history.domains).flatMap((actions) => ACTIONS.flatMap((action) => actions[action] ?? []));
    top.setHistory(history.features, all.reduce((sum, n) => sum + n, 0), asked);
    dirty = true;
  }

  function auditProblem(error) {
    if (signal.aborted || auditTold) return;
    auditTold = true;
    tell(`The audit could not be read: ${error.message}`);
  }

  // ---- stats ----

  async function poll() {
    if (document.hidden) return;
    try {
      const stats = await get("v1/stats", {}, { signal });
      offset = stats.time - Date.now() / 1000;
      if (!can.events) countFrom(stats);
      compare(stats);
      tiles.show(stats, listening ? 2 : 1); // itself, and the stream
      last = stats;
      problem.hidden = true;
    } catch (error) {
      if (signal.aborted) return;
      tiles.stale();
      const words = `${error.message}${last === null ? "" : ` The numbers are those of ${clock(last.time)}.`} It is tried again every few seconds.`;
      if (problem.textContent !== words) problem.textContent = words; // or it would be read out each time
      problem.hidden = false;
      return;
    }
    if (can.audit && now() - historyAt > HISTORY) await readHistory().catch(auditProblem);
  }

  /** Without the events, the counters' growth is what is known of the verdicts. */
  function countFrom(stats) {
    for (const [domain, counts] of Object.entries(stats.verdicts)) {
      for (const action of ACTIONS) {
        const grown = (counts[action] ?? 0) - (last?.verdicts[domain]?.[action] ?? (last === null ? counts[action] ?? 0 : 0));
        if (grown > 0) { store.add(domain, action, stats.time, grown); dirty = true; }
      }
    }
  }

  function compare(stats) {
    if (last === null) return;
    for (const what of ["bank", "policy"]) {
      if (stats[what] === last[what]) continue;
      tell(`At ${clock(stats.time)} the ${what} changed: ${last[what]} is now ${stats[what]}.`);
      refreshAbout().catch(() => {}); // the header says if the server is gone
    }
    if (stats.errors > last.errors) tell(`At ${clock(stats.time)} the guard failed again: ${stats.errors} internal errors altogether.`);
  }

  async function keepPolling() {
    while (!signal.aborted) {
      await poll();
      await new Promise((resolve) => { timer = setTimeout(resolve, POLL); });
    }
  }

  // ---- start ----

  let timer = 0;
  let live = null;
  let listening = false;
  let connected = false;
  if (can.events) {
    live = liveEvents({ onEvent, onState: (next) => {
      list.setState(next);
      listening = next.name === "live";
      if (next.name === "live" && connected && can.audit) readAudit(false).catch(() => {}); // the stream itself goes on
      connected ||= next.name === "live";
    } });
  } else {
    list.setState({ name: "off", message: `The stream of verdicts needs a key of role reader or admin${about.role ? `; this one is a ${about.role}’s` : ""}. The counts above are those of the server’s metrics.` });
  }
  if (can.audit) readAudit(true).catch(auditProblem);
  keepPolling();
  rates.draw();
  top.draw(since());
  let drawnAt = 0;
  const drawing = setInterval(() => {
    if (document.hidden || (!dirty && now() - drawnAt < 5)) return;
    dirty = false;
    drawnAt = now();
    rates.draw();
    top.draw(since());
  }, 1000);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); }, { signal });

  return { stop: () => { ended.abort(); live?.stop(); clearTimeout(timer); clearInterval(drawing); rates.stop(); list.stop(); } };
}
