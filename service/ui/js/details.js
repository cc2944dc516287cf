// What the server says of single features, kept while they are looked at.

import { get } from "./api.js";

const KEPT = 60;
const ID = /^L\d+\/\d+$/;

/** Answers of `GET /v1/features/{id}`. */
export class Details {
  #found = new Map();
  #signal;

  /** signal: ends all that is under way. */
  constructor(signal) {
    this.#signal = signal;
  }

  /** The feature `id`, or null if the bank has none of that name. Raises ApiError. */
  get(id) {
    if (!ID.test(id)) return Promise.resolve(null);
    if (!this.#found.has(id)) {
      const answer = get(`v1/features/${id}`, {}, { signal: this.#signal }).catch((error) => {
        if (error.code === "feature_not_found" || error.status === 404) return null;
        this.#found.delete(id);
        throw error;
      });
      this.#found.set(id, answer);
      if (this.#found.size > KEPT) this.#found.delete(this.#found.keys().next().value);
    }
    return this.#found.get(id);
  }

  /** Ask for it before it is needed. A failure is told when it is needed. */
  ahead(id) {
    if (id) this.get(id).catch(() => {});
  }

  /** Take over what the server answered to a review. */
  async reviewed(id, { review, effective }) {
    if (!this.#found.has(id)) return;
    const detail = await this.get(id).catch(() => null);
    if (detail) this.#found.set(id, Promise.resolve({ ...detail, effective, reviews: [...detail.reviews, review] }));
  }

  /** The bank has changed. */
  forget() {
    this.#found.clear();
  }
}
