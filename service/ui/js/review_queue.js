// Reviews on their way to the server: one after the other, in the order in which they were given.

import { post } from "./api.js";
import { forgetCatalogue } from "./catalogue.js";
import { labelAfter } from "./review_log.js";

/**
 * A queue of entries {draft, before, after}. The first that fails stops it, so that no later one overtakes it; `retry` or `drop` sets it going
 * again. It outlives the view: what was decided is sent even if one has gone elsewhere.
 */
export class ReviewQueue {
  #entries = [];
  #listeners = new Set();
  #sending = false;
  /** Why the first entry could not be saved, or null. */
  failure = null;

  /** Those that are not saved yet. */
  get entries() {
    return [...this.#entries];
  }

  /** The label that holds of a feature once all are saved; null if none is waiting. */
  pending(feature) {
    return this.#entries.findLast((entry) => entry.draft.feature === feature)?.after ?? null;
  }

  /** Whether an entry still lies here untouched, so that it can be dropped. */
  untouched(entry) {
    return this.#entries.includes(entry) && !(this.#sending && this.#entries[0] === entry);
  }

  /** listener({saved, answer}) or listener({}) whenever something changes. Returns what ends that. */
  listen(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  push(entry) {
    this.#entries.push(entry);
    addEventListener("beforeunload", warn);
    this.#tell({});
    this.#work();
  }

  /** Take an entry out again. */
  drop(entry) {
    if (!this.untouched(entry)) return;
    if (this.#entries[0] === entry) this.failure = null;
    this.#entries.splice(this.#entries.indexOf(entry), 1);
    // What was given to the same feature after it was worked out upon it.
    let label = entry.before;
    for (const later of this.#entries.filter((one) => one.draft.feature === entry.draft.feature)) {
      later.before = label;
      label = later.after = labelAfter(label, later.draft);
    }
    this.#settle();
    this.#tell({ dropped: entry });
    this.#work();
  }

  /** Send again what failed. */
  retry() {
    this.failure = null;
    this.#tell({});
    this.#work();
  }

  async #work() {
    if (this.#sending || this.failure) return;
    this.#sending = true;
    while (this.#entries.length > 0) {
      const entry = this.#entries[0];
      try {
        const answer = await post("admin/reviews", entry.draft);
        this.#entries.shift();
        forgetCatalogue();
        this.#settle();
        this.#tell({ saved: entry, answer });
      } catch (error) {
        this.failure = error;
        break;
      }
    }
    this.#sending = false;
    this.#tell({});
  }

  #settle() {
    if (this.#entries.length === 0) removeEventListener("beforeunload", warn);
  }

  #tell(news) {
    for (const listener of this.#listeners) listener(news);
  }
}

function warn(event) {
  event.preventDefault();
}
