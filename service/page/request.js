// One segmentation over HTTP, and every way it can fail as a sentence.

import { askForKey, keyHeader } from "./key.js";

const TRANSIENT = new Set([408, 429, 502, 503, 504]);

/** The service said no. `message` is a sentence for people; `again` tells whether the same request may work later. */
export class Refusal extends Error {
  constructor(message, again) {
    super(message);
    this.again = again;
  }
}

/** The service wants a key, or another one. */
class Locked extends Refusal {}

/**
 * Send a picture to POST /segment; gives {answer, elapsed}, `elapsed` in milliseconds as seen from here.
 *
 * Throws a Refusal, or the browser's AbortError once `signal` is aborted.
 */
export const segment = (picture, options, signal) => unlocked(() => post(picture, options, signal));

/** GET a JSON document of the service; throws a Refusal. */
export const get = (url) => unlocked(async () => (await reach(url)).json());

/** GET a file of the service; throws a Refusal. */
export const getFile = (url) => unlocked(async () => (await reach(url)).blob());

async function post(picture, { scales, flip }, signal) {
  const form = new FormData();
  form.append("image", picture, picture.name);
  form.append("scales", scales.join(","));
  form.append("flip", String(flip));
  const started = performance.now();
  const headers = { Accept: "application/json" };
  const response = await reach("segment", { method: "POST", body: form, headers, signal });
  const answer = await response.json();
  return { answer, elapsed: performance.now() - started };
}

/** Do the work, and again with each key that the person gives while the service asks for one. */
async function unlocked(work) {
  for (;;) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof Locked && (await askForKey()))) {
        throw error;
      }
    }
  }
}

async function reach(url, options = {}) {
  let response;
  try {
    response = await fetch(url, { ...options, headers: { ...options.headers, ...keyHeader() } });
  } catch (error) {
    if (error.name === "AbortError") {
      throw error;
    }
    throw new Refusal("The service does not answer. Is it still running, and is the network up?", true);
  }
  if (!response.ok) {
    throw await refusalOf(response);
  }
  return response;
}

/** An answer that is no success -> a Refusal that says what the service said, and when to come back. */
export async function refusalOf(response) {
  const fault = await response.json().then(
    (body) => body.error,
    () => null,
  );
  const said = fault?.message ?? `the service answered ${`${response.status} ${response.statusText}`.trim()}`;
  const parts = [sentence(said)];
  const seconds = Number(response.headers.get("Retry-After"));
  if (seconds > 0) {
    parts.push(`Try again in ${seconds} ${seconds === 1 ? "second" : "seconds"}.`);
  }
  if (response.status >= 500 && fault?.request_id) {
    parts.push(`The request was ${fault.request_id}.`);
  }
  const kind = response.status === 401 ? Locked : Refusal;
  return new kind(parts.join(" "), kind === Locked || TRANSIENT.has(response.status));
}

/** The words as a sentence: a capital first, a full stop last. */
export function sentence(words) {
  const text = words.charAt(0).toUpperCase() + words.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}
