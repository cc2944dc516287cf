// What reviews do to a feature's label, and which further reviews take one back: the log is append-only.

/** The label that holds after a review, as the server will work it out too. */
export function labelAfter(label, { verdict, overrides }) {
  if (verdict === "note") return label;
  return { ...label, ...(overrides ?? {}), status: verdict === "reject" ? "rejected" : "accepted" };
}

/**
 * How to take back a review that has been saved: a list of ways, each {text, drafts, done}: what it is called, the further reviews, and what
 * holds then. One way needs no asking. A feature that nobody had reviewed cannot be made so again, since no verdict means unreviewed: then
 * there are two.
 */
export function waysBack({ draft, before }) {
  const { feature, verdict } = draft;
  const note = (text) => [{ feature, verdict: "note", reason: text }];
  if (verdict === "note") return [{ done: "A further note says that it is taken back.", drafts: note("Taken back: the note before this one.") }];
  if (verdict === "relabel") return [restoreLabels(draft, before)];
  if (before.status === "accepted") return [{ done: "It is accepted again.", drafts: [{ feature, verdict: "accept", reason: "Taken back: the verdict before this one." }] }];
  if (before.status === "rejected") return [{ done: "It is rejected again.", drafts: [{ feature, verdict: "reject", reason: "Taken back: the verdict before this one." }] }];
  if (verdict === "reject") {
    return [
      { text: "Accept it instead", done: "It is accepted now.", drafts: [{ feature, verdict: "accept", reason: "Taken back: the rejection before this." }] },
      { text: "Leave it rejected, with a note that the rejection is taken back", done: "It stays rejected; a note says that this is taken back.", drafts: note("Taken back: the rejection before this. It is to be reviewed again.") },
    ];
  }
  return [
    { text: "Leave it accepted, with a note that the verdict is taken back", done: "It stays accepted; a note says that this is taken back.", drafts: note("Taken back: the acceptance before this. It is to be reviewed again.") },
    { text: "Reject it instead", done: "It is rejected now.", drafts: [{ feature, verdict: "reject", reason: "Taken back: the acceptance before this." }] },
  ];
}

function restoreLabels({ feature, overrides }, before) {
  const old = Object.fromEntries(Object.keys(overrides).filter((name) => name !== "explanation" || before.explanation !== "").map((name) => [name, before[name]]));
  const drafts = [{ feature, verdict: "relabel", overrides: old, reason: "Taken back: the labels before this." }];
  if (before.status === "rejected") drafts.push({ feature, verdict: "reject", reason: "Taken back: it was rejected before it was relabelled." });
  const done = before.status === "unreviewed" ? "The labels are as before. It stays accepted: no verdict means unreviewed." : `The labels are as before; it is ${before.status}.`;
  return { done, drafts };
}
