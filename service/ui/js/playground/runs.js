// What has been said of one run, token by token, without any of the page's elements.

/** One run of a request: `cells` are what can be seen and selected, one or more tokens that end a character each. */
export class Run {
  #waiting = [];
  #places = new Map();
  #series = new Map();

  constructor(name, domains) {
    this.name = name;
    this.domains = domains;
    this.cells = [];
    this.verdicts = [];
    this.end = null;
    this.boundary = null; // the first cell of the answer
  }

  /** Take tokens as they came. Returns the cells that are complete now; tokens of the chat template give none. */
  push(phase, tokens) {
    const before = this.cells.length;
    for (const token of tokens) {
      const first = this.#waiting[0];
      if (!token.o || (first && (first.phase !== phase || first.g !== token.g))) this.flush();
      if (!token.o) continue;
      this.#waiting.push({ ...token, phase });
      if (token.t !== "") this.#close();
    }
    return this.cells.slice(before);
  }

  /** Nothing will complete the tokens that wait: the cell before has them too. */
  flush() {
    if (this.#waiting.length === 0) return;
    const cell = this.cells.at(-1);
    if (!cell || cell.phase !== this.#waiting[0].phase) {
      this.#close();
      return;
    }
    for (const token of this.#waiting) this.#places.set(place(token.phase, token.i), cell.at);
    cell.index = this.#waiting.at(-1).i;
    this.#waiting = [];
  }

  /** The cell with a token of that number, or undefined. */
  cellOf(phase, index) {
    return this.cells[this.#places.get(place(phase, index))];
  }

  /** Whether that token has come but waits for the rest of its character. */
  waitsFor(phase, index) {
    return this.#waiting.some((token) => token.phase === phase && token.i === index);
  }

  /** The text of the prompt or of the answer, as far as it has come. */
  text(phase) {
    return this.cells.filter((cell) => cell.phase === phase).map((cell) => cell.text).join("");
  }

  /** What the next turn may build on: the answer, or null if it was blocked, broken off or empty. */
  get answer() {
    if (this.end === null || this.end.action === "block" || this.end.finish_reason === "content_filter") return null;
    return this.text("response").trim() || null;
  }

  /** A domain's score (`domain:NAME`) or a feature's activation (`feature:ID`) in every cell. Kept, and made longer as cells come. */
  series(key) {
    let values = this.#series.get(key);
    if (!values) this.#series.set(key, (values = []));
    const [kind, name] = split(key);
    const column = this.domains.indexOf(name);
    for (let at = values.length; at < this.cells.length; at += 1) {
      values.push(kind === "domain" ? this.cells[at].s[column] ?? 0 : activation(this.cells[at], name));
    }
    return values;
  }

  #close() {
    const tokens = this.#waiting;
    const last = tokens.at(-1);
    this.#waiting = [];
    const cell = { at: this.cells.length, phase: last.phase, g: last.g, text: last.t, first: tokens[0].i, index: last.i, s: scores(tokens), f: features(tokens) };
    if (cell.phase === "response") this.boundary ??= cell.at;
    for (const token of tokens) this.#places.set(place(token.phase, token.i), cell.at);
    this.cells.push(cell);
  }
}

/** `domain:violence` as ["domain", "violence"]. */
export function split(key) {
  const at = key.indexOf(":");
  return [key.slice(0, at), key.slice(at + 1)];
}

/** How active a feature is in a cell; 0 if it is not. */
export function activation(cell, id) {
  for (const feature of cell.f) if (feature[0] === id) return feature[1];
  return 0;
}

/** The first cells at which two runs say different things, or null while one is how the other begins. */
export function parting(left, right) {
  const [a, b] = [left, right].map((run) => run.cells.filter((cell) => cell.phase === "response"));
  const at = a.findIndex((cell, i) => i < b.length && cell.text !== b[i].text);
  if (at >= 0) return { index: a[at].index, left: a[at], right: b[at] };
  if (a.length === b.length) return null;
  const next = Math.min(a.length, b.length);
  return { index: (a[next] ?? b[next]).index, left: a[next] ?? null, right: b[next] ?? null };
}

function place(phase, index) {
  return `${phase}:${index}`;
}

function scores(tokens) {
  if (tokens.length === 1) return tokens[0].s;
  return tokens.reduce((most, token) => token.s.map((score, i) => Math.max(score, most[i] ?? 0)), []);
}

function features(tokens) {
  if (tokens.length === 1) return tokens[0].f;
  const strongest = new Map();
  for (const feature of tokens.flatMap((token) => token.f)) {
    if (!(strongest.get(feature[0])?.[1] >= feature[1])) strongest.set(feature[0], feature);
  }
  return [...strongest.values()].sort((a, b) => b[1] - a[1]);
}
