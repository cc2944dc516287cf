"use strict";
// Filters and sorts the cards. The state stands in the address after #, so that a view can be kept and linked.
(() => {
  const form = document.getElementById("filters");
  const list = document.getElementById("cards");
  const count = document.getElementById("count");
  const nothing = document.getElementById("nothing");
  const names = ["q", "domain", "layer", "status", "kind", "sort"];
  const entries = Array.from(list.children, (card) => ({
    card,
    domains: card.dataset.domains ? card.dataset.domains.split(" ") : ["untagged"],
    layer: card.dataset.layer,
    status: card.dataset.status.split(" "),
    kind: card.dataset.kind,
    text: null,
  }));
  // Missing figures go last; a fall of the score is a negative effect, so the smallest is the strongest
  const figure = (name, sign) => (entry) => {
    const value = entry.card.dataset[name];
    return value === "" ? Infinity : sign * Number(value);
  };
  const orders = {
    "": figure("order", 1),
    auroc: figure("auroc", -1),
    corr: figure("corr", -1),
    effect: figure("effect", 1),
    density: figure("density", -1),
  };
  let sorted = "";

  const fits = (entry, wanted, words) => {
    if (wanted.domain && !entry.domains.includes(wanted.domain)) return false;
    if (wanted.layer && entry.layer !== wanted.layer) return false;
    if (wanted.status && !entry.status.includes(wanted.status)) return false;
    if (wanted.kind && entry.kind !== wanted.kind) return false;
    if (!words.length) return true;
    entry.text ??= entry.card.textContent.toLowerCase();
    return words.every((word) => entry.text.includes(word));
  };

  const read = () => Object.fromEntries(names.map((name) => [name, form.elements[name].value.trim()]));

  const apply = () => {
    const wanted = read();
    const words = wanted.q.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const entry of entries) {
      const fit = fits(entry, wanted, words);
      entry.card.hidden = !fit;
      shown += fit;
    }
    if (wanted.sort !== sorted) {
      const key = orders[wanted.sort];
      const first = orders[""];
      const order = [...entries].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        return x === y ? first(a) - first(b) : x - y;
      });
      list.append(...order.map((entry) => entry.card));
      sorted = wanted.sort;
    }
    count.textContent = `${shown.toLocaleString("en")} of ${entries.length.toLocaleString("en")}`;
    nothing.hidden = shown > 0;
  };

  const remember = () => {
    const wanted = Object.entries(read()).filter(([, value]) => value);
    const state = new URLSearchParams(wanted).toString();
    history.replaceState(null, "", state ? `#${state}` : location.pathname + location.search);
  };

  const fill = (state) => {
    for (const name of names) {
      const field = form.elements[name];
      const value = state.get(name) ?? "";
      const known = !field.options || Array.from(field.options).some((option) => option.value === value);
      field.value = known ? value : "";
    }
    apply();
  };

  // An address is a view of the list (it has a =), or a place on the page, which must not be filtered away
  const follow = () => {
    let place = location.hash.slice(1);
    if (place.includes("=")) {
      fill(new URLSearchParams(place));
      document.getElementById("features").scrollIntoView();
      return;
    }
    try {
      place = decodeURIComponent(place);
    } catch {
      return;
    }
    const target = place && document.getElementById(place);
    if (target && target.hidden) {
      fill(new URLSearchParams());
      target.scrollIntoView();
    }
  };

  let timer = 0;
  const change = () => {
    apply();
    remember();
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(change, 120);
  });
  form.addEventListener("reset", () => setTimeout(change));
  window.addEventListener("hashchange", follow);
  form.hidden = false;
  apply();
  follow();
})();
