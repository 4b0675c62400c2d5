// Calls of the service: what it has, and pictures as they come.

import { parse, write } from "./json.js";
import { bearer } from "./key.js";

/** What the service answers in place of pictures; status 0 where it cannot be reached. */
export class ServiceError extends Error {
  constructor(status, message, { field = null, code = null, wait = null } = {}) {
    super(message);
    Object.assign(this, { status, field, code, wait });
  }
}

/** The models, with what each can do. */
export async function models() {
  return parse(await (await call("v1/models")).text()).data;
}

/** The fields of a request to generate, as the API describes them: choices and defaults by name. */
export async function fields() {
  const document = await (await call("openapi.json")).json();
  return document.components.schemas.GenerationBody.properties;
}

/** The events of a task as they come: previews, pictures, errors of single pictures. Throws ServiceError. */
export async function* stream(task, signal, previews) {
  const more = { stream: true, ...(previews ? { partial_images: previews } : {}) };
  const response = await call(task.path, { method: "POST", signal, ...body(task, more) });
  for await (const { event, data } of events(response.body)) {
    const told = parse(data);
    if (event === "error") throw failure(0, told, null, 200);
    yield { preview: event.endsWith(".partial_image"), ...told };
  }
}

function body(task, more) {
  const fields = { ...task.fields, ...more };
  if (!task.files) return { body: write(fields), headers: { "Content-Type": "application/json" } };
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, String(value));
  for (const [name, file] of Object.entries(task.files)) form.append(name, file, `${name}.png`);
  return { body: form };
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, ...bearer() } });
  } catch (error) {
    throw lost(error);
  }
  if (response.ok) return response;
  const text = await response.text();
  let told;
  try {
    told = parse(text);
  } catch {
    told = {};  // something between here and the service answered, in words of its own
  }
  throw failure(response.status, told, response.headers.get("Retry-After"), response.status);
}

function failure(status, told, wait) {
  const error = told.error ?? {};
  const message = error.message ?? `the service answered with status ${status}`;
  const seconds = wait === null ? null : Number(wait) || 1;
  return new ServiceError(status || statusOf(error.code), message, { field: error.param, code: error.code, wait: seconds });
}

/** The status that a refusal would have had, had it come before the stream began. */
function statusOf(code) {
  return { overloaded: 503, timeout: 504, failed: 503, unavailable: 503, rate_limit: 429 }[code] ?? 500;
}

function lost(error) {
  return error.name === "AbortError" ? error : new ServiceError(0, "the service cannot be reached");
}

/** Server-sent events (HTML Living Standard, 9.2) of a body, each with its event and data. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) yield event(part);
    }
  } catch (error) {
    throw lost(error);
  } finally {
    reader.cancel().catch(() => {});
  }
}

function event(text) {
  const found = { event: "message", data: "" };
  for (const line of text.split("\n")) {
    const at = line.indexOf(": ");
    found[line.slice(0, at)] = line.slice(at + 2);
  }
  return found;
}
