// The texts of a card: tokens, and excerpts with each token shaded by its activation.

import { el } from "./dom.js";
import { fixed, visible } from "./format.js";

const LEVELS = 5;
// Control characters but for tab and newline, marks that reorder what is shown, halves of characters.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

/** A text that nobody has vouched for, with what would not be seen, or would reorder the rest, made visible. */
export function readable(text) {
  return text.replace(UNSEEN, (mark) => (mark < " " ? String.fromCharCode(0x2400 + mark.charCodeAt(0)) : mark === "\u007f" ? "␡" : "\ufffd"));
}

/** A token on its own. */
export function tokenText(text) {
  return readable(visible(text));
}

/** The excerpts of a feature's record on which it fires. */
export function excerpts(feature) {
  return feature.evidence.map((one) => {
    const pieces = split(one);
    const strongest = pieces.filter((piece) => piece.activation > 0).sort((a, b) => b.activation - a.activation);
    return el("figure", { class: "excerpt" },
      el("blockquote", { attrs: { dir: "auto" } }, pieces.map(piece)),
      el("figcaption", { class: "soft" }, `peak ${fixed(one.activation)} at `, el("bdi", { class: "mono", text: tokenText(one.peak) }),
        strongest.length > 1 ? el("span", { class: "sr", text: `; activations: ${strongest.map(({ text, activation }) => `${readable(text).trim()} ${fixed(activation)}`).join(", ")}` }) : null));
  });
}

function piece({ text, activation }, place) {
  const level = Math.max(0, Math.min(LEVELS, Math.ceil(activation * LEVELS)));
  const shown = readable(text);
  const space = /^ +(?=.)/s.exec(shown)?.[0] ?? ""; // stands before the mark: a shaded gap would draw the eye
  return [place === 0 ? "" : space, el(level ? "mark" : "span", { class: level ? `m${level}` : null, text: shown.slice(space.length), title: activation === null ? null : fixed(activation) })];
}

/** The excerpt's tokens; without them, its peak is looked for in the text, and marked if there is just one such place. */
function split({ text, peak, activation, tokens, activations }) {
  if (tokens.length) return tokens.map((token, index) => ({ text: token, activation: activations[index] }));
  const parts = peak ? text.split(peak) : [text];
  if (parts.length !== 2) return [{ text, activation: null }];
  return [{ text: parts[0], activation: null }, { text: peak, activation }, { text: parts[1], activation: null }];
}
