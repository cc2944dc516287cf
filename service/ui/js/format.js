// How numbers, times and names are written.

/** The domains that have a colour of their own, in the order in which they are shown. */
export const DOMAINS = ["pornography", "politics", "violence", "terror"];

/** Class that gives a domain its colour; others share one. */
export function hue(domain) {
  return DOMAINS.includes(domain) ? `d-${domain}` : "d-other";
}

/** 0.0312 as 3.1 %. */
export function percent(value, digits = 1) {
  return value === null || value === undefined || !Number.isFinite(value) ? "–" : `${(100 * value).toFixed(digits)} %`;
}

/** A number with so many digits after the point; – if there is none. */
export function fixed(value, digits = 2) {
  return value === null || value === undefined || !Number.isFinite(value) ? "–" : value.toFixed(digits).replace("-", "−");
}

/** 12345 as 12 345. */
export function whole(value) {
  return value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en").replaceAll(",", "\u202f");
}

/** A time of day, of seconds since 1970 or an ISO string. */
export function clock(time) {
  const date = typeof time === "number" ? new Date(1000 * time) : new Date(time);
  return Number.isNaN(date.getTime()) ? "–" : date.toLocaleTimeString([], { hour12: false });
}

/** A date and time, of an ISO string. */
export function moment(time) {
  const date = new Date(time);
  return Number.isNaN(date.getTime()) ? "–" : `${date.toLocaleDateString()} ${date.toLocaleTimeString([], { hour12: false })}`;
}

/** A token as a reader can see it: a space at its ends and a line's end are made visible. */
export function visible(token) {
  return token.replace(/^ | $/g, "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}
