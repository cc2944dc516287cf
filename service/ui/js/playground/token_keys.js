// Where a key leads in a token flow.

const LINE_REACH = 400; // cells that are looked at for the next line
const LEAP = 10;

/** The place that `key` leads to from place `at` among the cells' elements; null if it is no key of a flow. */
export function moved(key, at, spans) {
  const last = spans.length - 1;
  const within = (to) => Math.min(last, Math.max(0, to));
  // In text that runs from right to left, the next token stands on the left.
  const forward = getComputedStyle(spans[at]).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
  switch (key) {
    case "ArrowLeft":
    case "ArrowRight":
      return within(key === forward ? at + 1 : at - 1);
    case "ArrowDown":
      return within(onNextLine(at, spans, 1) ?? at + LEAP);
    case "ArrowUp":
      return within(onNextLine(at, spans, -1) ?? at - LEAP);
    case "Home":
      return 0;
    case "End":
      return last;
    default:
      return null;
  }
}

/** The cell of the next line (step 1) or the one before (-1) that stands nearest below or above. */
function onNextLine(at, spans, step) {
  const from = middle(spans[at]);
  let line = null;
  let best = null;
  for (let to = at + step, seen = 0; spans[to] && seen < LINE_REACH; to += step, seen += 1) {
    const here = middle(spans[to]);
    if (Math.abs(here.y - from.y) < 8) continue;
    line ??= here.y;
    if (Math.abs(here.y - line) > 8) break;
    const far = Math.abs(here.x - from.x);
    if (best === null || far < best.far) best = { to, far };
  }
  return best?.to ?? null;
}

function middle(span) {
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  return { x: box.left + box.width / 2, y: box.top + box.height / 2 };
}
