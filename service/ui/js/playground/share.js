// The playground's state as part of an address, and a run as a file.

const MOST = 24000; // characters: what browsers, mail and chat programs still take as one link

/** A state as base64url of JSON, or null if it is too long for an address. */
export function encodeState(state) {
  const bytes = new TextEncoder().encode(JSON.stringify({ v: 1, ...state }));
  let binary = "";
  for (let at = 0; at < bytes.length; at += 8192) binary += String.fromCharCode(...bytes.subarray(at, at + 8192));
  const text = btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
  return text.length > MOST ? null : text;
}

/** The state that an address holds. Raises an Error that says what is wrong with it. Fields of wrong kinds are left out. */
export function decodeState(text) {
  if (text.length > 2 * MOST) throw new Error("This link is too long to have been made by this page.");
  let found;
  try {
    const binary = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = Uint8Array.from(binary, (character) => character.charCodeAt(0));
    found = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    throw new Error("This link is damaged: part of it is missing or was changed on its way.");
  }
  if (typeof found !== "object" || found === null || found.v !== 1) throw new Error("This link was made by another version of this page.");
  return cleaned(found);
}

/** A turn as a file holds it: what was asked, and every event that came, by run. */
export function runFile(turn, { model, bank, policy, version }) {
  const runs = Object.fromEntries([...turn.runs.keys()].map((name) => [name, turn.events.filter((event) => event.run === name)]));
  return {
    sailguard: version, time: new Date().toISOString(), model, bank: turn.started?.bank ?? bank.version, policy: turn.started?.policy ?? policy?.version,
    state: turn.state, request: turn.request, events: turn.events.filter((event) => event.run === undefined), runs,
  };
}

/** Let the browser save `data` as a JSON file. */
export function download(name, data) {
  const address = URL.createObjectURL(new Blob([JSON.stringify(data, null, 1)], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

function cleaned(found) {
  const string = (value) => (typeof value === "string" ? value : undefined);
  const number = (value) => (typeof value === "number" && Number.isFinite(value) ? value : undefined);
  const list = (value) => (Array.isArray(value) ? value : []);
  const settings = found.settings ?? {};
  return {
    mode: found.mode === "text" ? "text" : "chat",
    role: ["prompt", "response", "passage"].includes(found.role) ? found.role : "passage",
    text: string(found.text) ?? "",
    system: string(found.system) ?? "",
    messages: list(found.messages).filter((one) => ["user", "assistant"].includes(one?.role) && string(one.content) !== undefined).map(({ role, content }) => ({ role, content })),
    settings: { max_tokens: number(settings.max_tokens), temperature: number(settings.temperature), top_p: number(settings.top_p), seed: number(settings.seed) },
    steering: list(found.steering).filter((one) => string(one?.target) && number(one.value) !== undefined).slice(0, 20)
      .map((one) => ({ target: one.target, op: one.op === "add" ? "add" : "hold", value: one.value, on: one.on !== false })),
    compare: found.compare !== false,
    pins: list(found.pins).filter(isFeature).slice(0, 6),
    tint: string(found.tint) ?? "lead",
  };
}

/** Whether a text is the name of a feature, as L14/2031. */
export function isFeature(text) {
  return typeof text === "string" && /^L\d{1,4}\/\d{1,9}$/.test(text);
}
