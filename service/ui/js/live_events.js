// The connection to the server's verdicts: opened again after a break, a little later each time.

import { stream } from "./api.js";

const LONGEST_WAIT = 30;
const SILENCE = 45000; // the server gives a sign of life every 15 s; without one for so long the connection is dead

/**
 * Listen until `stop()`. `onEvent` gets every event. `onState` is told how the connection stands: {name: "connecting"},
 * {name: "live"}, {name: "waiting", seconds, message}, or {name: "refused", status, message}, which only `retry()` ends.
 */
export function liveEvents({ onEvent, onState }) {
  const ended = new AbortController();
  let wake = null;
  run();
  return { stop: () => { ended.abort(); wake?.(); }, retry: () => wake?.() };

  async function run() {
    let failures = 0;
    while (!ended.signal.aborted) {
      onState({ name: "connecting" });
      const opened = { at: null };
      const problem = await listen(opened);
      if (ended.signal.aborted) return;
      // A server that takes the connection and drops it at once is waited for as one that refuses it.
      failures = opened.at !== null && Date.now() - opened.at > 5000 ? 0 : failures + 1;
      if ([401, 403, 404].includes(problem?.status)) {
        onState({ name: "refused", status: problem.status, message: problem.message });
        await pause(null);
      } else {
        const seconds = problem?.retryAfter ?? Math.min(LONGEST_WAIT, 2 ** Math.max(0, failures - 1)) * (0.8 + 0.4 * Math.random());
        onState({ name: "waiting", seconds: Math.max(1, Math.round(seconds)), message: problem?.message ?? "The server ended the stream." });
        await pause(1000 * seconds);
      }
    }
  }

  async function listen(opened) {
    const attempt = new AbortController();
    let watchdog = 0;
    const onBeat = () => {
      if (opened.at === null) {
        opened.at = Date.now();
        onState({ name: "live" });
      }
      clearTimeout(watchdog);
      watchdog = setTimeout(() => attempt.abort(), SILENCE);
    };
    try {
      await stream("v1/events", { signal: AbortSignal.any([ended.signal, attempt.signal]), onEvent, onBeat });
      return null;
    } catch (error) {
      return error.name === "AbortError" ? null : error;
    } finally {
      clearTimeout(watchdog);
    }
  }

  /** Wait `ms`, for ever if null, or until somebody does not want to. */
  function pause(ms) {
    return new Promise((resolve) => {
      const timer = ms === null ? 0 : setTimeout(resolve, ms);
      wake = () => { clearTimeout(timer); resolve(); };
    });
  }
}
