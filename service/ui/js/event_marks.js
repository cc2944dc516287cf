// Saying of a verdict whether it was right: marks on what the spool keeps, for a refit of the heads.

import { get, post } from "./api.js";
import { about } from "./app.js";
import { button, el, field, select } from "./dom.js";

const NAME = "sailguard-reviewer"; // the one of the Explorer's reviews
const SAID = { false_positive: "False positive", correct: "Correct", miss: "Missed" };

/** The buttons by which `event` is marked; null where the key that asks may not, or nothing is spooled. */
export function markBar(event) {
  if (!about.can.mark) return null;
  const told = el("p", { class: "soft", attrs: { role: "status" }, data: { marked: "" } });
  const name = el("input", { class: "input", attrs: { type: "text", maxlength: 200, autocomplete: "name", value: localStorage.getItem(NAME) ?? "" } });
  const domains = event.domain ? [event.domain] : [];
  const others = about.domains.filter((domain) => domain !== event.domain);
  const missed = select(others.map((domain) => [domain, domain]), others[0], null, { "aria-label": "Domain that was missed" });
  const buttons = [
    ...domains.flatMap((domain) => ["false_positive", "correct"].map((mark) => act(mark, () => domain))),
    act("miss", () => missed.value),
  ];

  function act(mark, domain) {
    return button(SAID[mark], () => give(mark, domain()), { class: "btn small", data: { mark } });
  }

  async function give(mark, domain) {
    const reviewer = name.value.trim();
    if (reviewer === "") {
      told.textContent = "Say who you are first: a mark bears its reviewer's name.";
      name.focus();
      return;
    }
    localStorage.setItem(NAME, reviewer);
    for (const one of buttons) one.disabled = true;
    told.textContent = "Marking…";
    try {
      const item = await spooled(event);
      if (item === null) {
        told.textContent = "The spool does not hold this text: it is written a moment after the verdict, and removed after some days.";
      } else {
        await post(`admin/spool/${item.id}/marks`, { domain, mark, reviewer });
        told.textContent = `Marked by ${reviewer}: ${domain}, ${SAID[mark].toLowerCase()}.`;
      }
    } catch (error) {
      told.textContent = error.message;
    }
    for (const one of buttons) one.disabled = false;
  }

  return el("div", { class: "event-marks", aria: { label: "Was it right?" }, attrs: { role: "group" } },
    el("div", { class: "mark-row" }, buttons.slice(0, -1)), el("div", { class: "mark-row" }, buttons.at(-1), missed), field("Your name", name), told);
}

/** The item of the spool that `event` is about, or null. A prompt that several choices share is kept once, with the first. */
async function spooled(event) {
  const { data } = await get("admin/spool", { request_id: event.request_id, phase: event.phase, limit: 500 });
  const same = data.find((item) => item.choice === event.choice);
  if (same !== undefined) return same;
  if (event.phase !== "prompt") return null;
  const before = data.filter((item) => item.choice < event.choice).sort((one, other) => other.choice - one.choice);
  return before[0] ?? null;
}
