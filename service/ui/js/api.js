// The server's API. The key lives in this tab's session alone, and goes with every request as a bearer token.

const BASE = new URL("./", document.baseURI);
const KEY = "sailguard-key";

/** A refusal of the server's, or none at all (status 0: it could not be reached, or the connection broke). */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null, retryAfter = null } = {}) {
    super(message);
    this.name = "ApiError";
    Object.assign(this, { status, code, param, retryAfter });
  }
}

let askForKey = null;

/** `ask` is called when the server wants a key; it resolves with one, or null if the user gives none. */
export function onKeyWanted(ask) {
  askForKey = ask;
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** GET `path` with query `params`; null and empty ones are left out, arrays are repeated. */
export function get(path, params = {}, options = {}) {
  return whole("GET", address(path, params), undefined, options);
}

/** POST a JSON `body` to `path`. */
export function post(path, body, options = {}) {
  return whole("POST", address(path), body, options);
}

/**
 * Read server-sent events of `path` as they come: `onEvent` is called with each one's JSON. Resolves when the server has
 * ended the stream. With `until`, a type of event, a stream that ends without it is an error: it was cut off.
 * `onBeat` is called once the server has answered, and whenever anything comes, its signs of life included.
 */
export async function stream(path, { body, params, signal, onEvent, onBeat, until } = {}) {
  const response = await send(body === undefined ? "GET" : "POST", address(path, params), body, { signal, accept: "text/event-stream" });
  onBeat?.();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = until === undefined;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      onBeat?.();
      const parts = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
        if (!data || data === "[DONE]") continue;
        const event = JSON.parse(data);
        ended ||= event.type === until;
        onEvent(event);
      }
    }
  } catch (error) {
    throw readable(error);
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!ended) throw new ApiError("The connection broke before the answer was complete.", { code: "connection_lost" });
}

function address(path, params = {}) {
  const url = new URL(path.replace(/^\//, ""), BASE);
  for (const [name, value] of Object.entries(params)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined && one !== "") url.searchParams.append(name, one);
    }
  }
  return url;
}

async function whole(method, url, body, options) {
  const response = await send(method, url, body, options);
  try {
    return await response.json();
  } catch (error) {
    throw readable(error);
  }
}

async function send(method, url, body, { signal, accept = "application/json" } = {}) {
  for (;;) {
    const used = key.get();
    const headers = { Accept: accept };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (used) headers.Authorization = `Bearer ${used}`;
    let response;
    try {
      response = await fetch(url, { method, headers, signal, cache: "no-store", credentials: "omit", body: body === undefined ? undefined : JSON.stringify(body) });
    } catch (error) {
      throw readable(error);
    }
    if (response.ok) return response;
    if (response.status === 401 && askForKey !== null) {
      // Another call may have asked meanwhile: a key that is new since is tried first.
      if (key.get() !== used || (await askForKey(used !== null))) continue;
    }
    throw await refusal(response);
  }
}

async function refusal(response) {
  let found = {};
  try {
    found = (await response.json()).error ?? {};
  } catch { /* not ours: a proxy between, say */ }
  const message = found.message ?? `The server answered with ${response.status}.`;
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  return new ApiError(message, { status: response.status, code: found.code, param: found.param, retryAfter });
}

function readable(error) {
  if (error instanceof ApiError || error.name === "AbortError") return error;
  return new ApiError("The server cannot be reached, or the connection broke. Is it still running?", { code: "connection_lost" });
}
