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
export const get = (url) => unlocked(() => reach(url, json));

/** GET a file of the service; throws a Refusal. */
export const getFile = (url) => unlocked(() => reach(url, (response) => response.blob()));

const json = (response) => response.json();

async function post(picture, { model, scales, flip }, signal) {
  const content = await picture.arrayBuffer().catch(() => {
    throw new Refusal(`The file ${picture.name} cannot be read: it is a folder, or was changed after it was chosen.`, false);
  });
  const form = new FormData();
  form.append("image", new Blob([content], { type: picture.type }), picture.name);
  if (model) {
    form.append("model", model);
  }
  form.append("scales", scales.join(","));
  form.append("flip", String(flip));
  const started = performance.now();
  const headers = { Accept: "application/json" };
  const answer = await reach("segment", json, { method: "POST", body: form, headers, signal });
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

/** What `read` makes of the service's answer; throws a Refusal, or the browser's AbortError. */
async function reach(url, read, options = {}) {
  let response;
  try {
    response = await fetch(url, { ...options, headers: { ...options.headers, ...keyHeader() } });
    if (response.ok) {
      return await read(response);
    }
  } catch (error) {
    if (error.name === "AbortError") {
      throw error;
    }
    const isForeign = error instanceof SyntaxError;
    throw new Refusal(
      isForeign
        ? "What answers here is not the service. Does a proxy or a sign-in page stand before it?"
        : "The service does not answer. Is it still running, and is the network up?",
      true,
    );
  }
  throw await refusalOf(response);
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
