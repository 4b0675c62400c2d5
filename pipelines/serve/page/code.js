// The request behind a picture, as a command and as a program that make the same picture again.

import { write } from "./json.js";

// Fields that the openai client has parameters for; all others go as extra_body.
const KNOWN = ["model", "prompt", "n"];
const VARIABLE = "IMAGES_API_KEY";

/** The call by curl; with `guarded`, the key is taken from the environment. */
export function curl({ task, index }, service, guarded) {
  const lines = [`curl -s ${quoted(service + task.path)}`];
  if (guarded) lines.push(`-H "Authorization: Bearer $${VARIABLE}"`);
  if (task.files) {
    for (const name of Object.keys(task.files)) lines.push(`-F ${name}=@${name}.png`);
    for (const [name, value] of Object.entries(task.fields)) lines.push(`${form(value)} ${quoted(`${name}=${value}`)}`);
  } else {
    lines.push("-H 'Content-Type: application/json'", `-d ${quoted(write(task.fields))}`);
  }
  return `${lines.join(" \\\n  ")} \\\n  | jq -r '.data[${index}].b64_json' | base64 --decode > picture.png`;
}

/** The call by Python and the openai client. */
export function python(picture, service, guarded) {
  const { task, index } = picture;
  const names = Object.keys(task.files ?? {});
  const call = task.kind === "denoise" ? denoise(task) : known(task);
  const opened = names.map((name) => `open("${name}.png", "rb") as ${name}`).join(", ");
  const made = names.length ? `with ${opened}:\n${indented(call)}` : call;
  return [
    ["import base64", ...(guarded ? ["import os"] : [])].join("\n"), "",
    "from openai import OpenAI",
    ...(task.kind === "denoise" ? ["from openai.types import ImagesResponse"] : []), "",
    `client = OpenAI(base_url=${text(`${service}v1`)}, api_key=${guarded ? `os.environ["${VARIABLE}"]` : '"none"'})`,
    "", made,
    'with open("picture.png", "wb") as file:',
    `    file.write(base64.b64decode(answer.data[${index}].b64_json))`,
  ].join("\n");
}

/** The call of a method that the client has. */
function known({ fields, files }) {
  const more = Object.entries(fields).filter(([name]) => !KNOWN.includes(name));
  const rows = KNOWN.filter((name) => name in fields).map((name) => `${name}=${literal(name, fields[name])},`);
  for (const name of Object.keys(files ?? {})) rows.push(`${name}=${name},`);
  rows.push(`extra_body={${pairs(more)}},`);
  return `answer = client.images.${files ? "edit" : "generate"}(\n${indented(rows.join("\n"))}\n)`;
}

/** The call of the address that is ours alone. */
function denoise({ fields }) {
  const rows = [
    '"/images/denoise",', "cast_to=ImagesResponse,", `body={${pairs(Object.entries(fields))}},`, 'files={"image": image},',
    'options={"headers": {"Content-Type": "multipart/form-data"}},',
  ];
  return `answer = client.post(\n${indented(rows.join("\n"))}\n)`;
}

function pairs(entries) {
  return entries.map(([name, value]) => `"${name}": ${literal(name, value)}`).join(", ");
}

function literal(name, value) {
  return name === "seed" || name === "parent" || typeof value === "number" ? String(value) : text(value);
}

/** The option for a field: with -F, a value that begins with @ or < would be read from a file. */
function form(value) {
  return /^[@<]/.test(value) ? "--form-string" : "-F";
}

/** A Python string. */
function text(value) {
  return JSON.stringify(value);
}

/** A word of the shell. */
function quoted(value) {
  return `'${value.replaceAll("'", "'\\''")}'`;
}

function indented(lines) {
  return lines.replace(/^/gm, "    ");
}
