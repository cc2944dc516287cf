// What is said where a run went wrong, and how to go on.

import { button, el } from "../dom.js";

const HEADS = {
  0: "Connection lost",
  400: "The server did not take this request",
  401: "This needs a key",
  403: "This key may not do that",
  413: "This is too long for the server",
  429: "Too many requests for now",
  503: "The server is not ready",
  504: "The server took too long",
};
const HINTS = {
  403: "Steering needs an admin's key. The button at the top right takes another one.",
  504: "A shorter answer, or a moment of less traffic, may help.",
};

/** A message with a way to go on. arrived: whether part of an answer stands above it. */
export function trouble(error, { arrived, onAgain }) {
  const status = error.status ?? null;
  const head = HEADS[status] ?? (status === null ? "The run could not be completed" : `The server answered with ${status}`);
  const wait = error.retryAfter ? `The server asks to wait ${error.retryAfter} s.` : null;
  return el("div", { class: "callout error pg-trouble", attrs: { role: "alert" }, data: { code: error.code ?? status ?? "error" } },
    el("p", {}, el("strong", { text: `${head}. ` }), el("bdi", { text: error.message })),
    wait || HINTS[status] ? el("p", { text: [wait, HINTS[status]].filter(Boolean).join(" ") }) : null,
    arrived ? el("p", { class: "soft", text: "What had arrived until then stands above." }) : null,
    button("Run again", onAgain, { class: "btn small" }));
}
