// All features of the bank in use, read once for each version of it and again when reviews have changed them.

import { get } from "./api.js";

const PAGE = 1000;
let loading = null;
let version = null;

/** {version, list, byId}: the summaries of `GET /v1/features`. `wanted` is the version that /v1/about names. */
export function catalogue(wanted) {
  if (loading === null || (wanted !== undefined && wanted !== version)) {
    version = wanted;
    loading = load();
    loading.catch(() => { loading = null; });
  }
  return loading;
}

/** Forget it: a review has changed a label. */
export function forgetCatalogue() {
  loading = null;
}

async function load() {
  const list = [];
  for (;;) {
    const page = await get("v1/features", { limit: PAGE, offset: list.length });
    list.push(...page.data);
    if (list.length >= page.total || page.data.length === 0) {
      return { version: page.bank, list, byId: new Map(list.map((feature) => [feature.id, feature])) };
    }
  }
}
