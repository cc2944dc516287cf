// Verdicts by moment, domain and action: what came while the page was open, put behind what the audit knows of before.

import { ACTIONS } from "./charts.js";

const KEPT = 3660; // seconds
const FINE = 10; // moments of a second: what the audit's counts end with lies within one

/** Counts of one hour. Times are seconds since 1970 by the server's clock. */
export class RateStore {
  constructor(domains) {
    this.domains = [...domains];
    this.seconds = new Map(); // second, to a tenth → Map("domain action" → count)
    this.history = null;
    this.until = -Infinity; // what came earlier is in the history
  }

  /** Count `n` verdicts of the moment in which `time` lies. */
  add(domain, action, time, n = 1) {
    if (!ACTIONS.includes(action) || !Number.isFinite(time)) return;
    if (!this.domains.includes(domain)) this.domains.push(domain);
    const second = Math.floor(time * FINE) / FINE;
    let counts = this.seconds.get(second);
    if (counts === undefined) this.seconds.set(second, counts = new Map());
    const name = `${domain} ${action}`;
    counts.set(name, (counts.get(name) ?? 0) + n);
  }

  /** Take the audit's counts by minute, complete up to the time `until`. */
  setHistory(history, until) {
    this.history = history;
    this.until = until;
    for (const domain of Object.keys(history.domains)) if (!this.domains.includes(domain)) this.domains.push(domain);
  }

  /** The last `minutes` before `now`: {width: seconds of a bin, starts, series: {domain: {flag, steer, block}}}. */
  bins(minutes, now) {
    for (const second of this.seconds.keys()) if (second < now - KEPT) this.seconds.delete(second);
    const width = minutes <= 5 ? 10 : 60;
    const withHistory = width === 60 && this.history !== null;
    // The bins lie as the history's minutes do, so that no minute has to be divided.
    const origin = withHistory ? this.history.start : 0;
    const last = origin + Math.floor((now - origin) / width) * width;
    const count = (60 * minutes) / width;
    const starts = Array.from({ length: count }, (_, bin) => last - (count - 1 - bin) * width);
    const series = Object.fromEntries(this.domains.map((domain) => [domain, Object.fromEntries(ACTIONS.map((action) => [action, new Array(count).fill(0)]))]));
    for (const [second, counts] of this.seconds) {
      const bin = Math.floor((second - starts[0]) / width);
      if (bin < 0 || bin >= count || (withHistory && second < this.until)) continue;
      for (const [name, n] of counts) {
        const space = name.lastIndexOf(" ");
        series[name.slice(0, space)][name.slice(space + 1)][bin] += n;
      }
    }
    if (withHistory) this.#addHistory(series, starts);
    return { width, starts, series };
  }

  #addHistory(series, starts) {
    for (const [domain, actions] of Object.entries(this.history.domains)) {
      for (const action of ACTIONS) {
        (actions[action] ?? []).forEach((n, minute) => {
          const bin = Math.round((this.history.start + 60 * minute - starts[0]) / 60);
          if (bin >= 0 && bin < starts.length) series[domain][action][bin] += n;
        });
      }
    }
  }
}
