// Playground: chat with the model or hand it a text, and see what its features say of every token.

import { about } from "./app.js";
import { Session, kindOf } from "./playground/session.js";
import { decodeState, isFeature } from "./playground/share.js";

const HANDOVER = "sailguard-handover";

let session = null; // it stays while another view is shown
let unwatch = () => {};

export const view = {
  name: "playground",
  title: "Playground",

  mount(root, state) {
    const shared = state.get("s");
    const fresh = session === null || session.kind !== kindOf(about) || (shared !== null && shared !== session.link);
    // With another key or bank it begins anew, but keeps what was written.
    const kept = fresh && shared === null ? session?.state : undefined;
    if (fresh) session = new Session();
    if (kept) session.restore(kept, false);
    root.append(session.element);
    unwatch = session.transcript.watch();
    if (fresh && shared !== null) open(shared);
    session.load();
    fromOtherViews(state);
  },

  unmount() {
    session.stop();
    session.traces.close();
    unwatch();
  },
};

function open(shared) {
  try {
    session.restore(decodeState(shared));
    session.link = shared;
  } catch (error) {
    session.transcript.notice(error.message, "error");
  }
}

function isTarget(text) {
  return isFeature(text) || about.domains.includes(text) || about.bank.concepts.includes(text);
}

/** The Explorer names a feature in the address; the Monitor leaves a text in the tab's storage, where no log sees it. */
function fromOtherViews(state) {
  for (const id of state.getAll("pin").filter(isFeature)) if (!session.pins.includes(id)) session.pin(id);
  for (const target of state.getAll("steer").filter(isTarget)) session.steer(target);
  const handed = sessionStorage.getItem(HANDOVER);
  if (handed === null) return;
  sessionStorage.removeItem(HANDOVER);
  try {
    const { text, role } = JSON.parse(handed);
    session.composer.restore({ mode: "text", text: String(text), role: ["prompt", "response"].includes(role) ? role : "passage", system: session.composer.system.value, settings: {}, message: session.composer.message.value });
  } catch {
    session.transcript.notice("The text that another view handed over could not be read.", "error");
  }
}
