// The page: brings the form, the gallery, the studio and the service together.

import { fields, models } from "./api.js";
import { find } from "./elements.js";
import { Gallery } from "./gallery.js";
import { keep, key } from "./key.js";
import { showNotice, words } from "./notice.js";
import { Run } from "./run.js";
import { Settings } from "./settings.js";
import { Studio } from "./studio.js";
import { drawnSeed } from "./elements.js";
import { generate } from "./tasks.js";

const RETRIED = [0, 429, 503, 504];

const settings = new Settings();
const gallery = new Gallery((picture) => studio.open(picture), again);
const studio = new Studio(settings, begin, say);
let current = null;

/** Tell those who do not see the page. */
function say(text) {
  find("live").textContent = text;
}

/** Ask the service what it has, and offer that. */
async function connect() {
  find("generate").disabled = true;
  find("state").textContent = "Connecting";
  try {
    const [found, described] = await Promise.all([models(), fields()]);
    if (!found.length) throw Object.assign(new Error("no model is loaded yet"), { status: 503, wait: 5 });
    settings.offer(found, described);
    settings.open(location.hash);
    find("notices").replaceChildren();
    find("generate").disabled = false;
    tellState();
  } catch (error) {
    find("state").textContent = words(error).title;
    explain(error, connect);
  }
}

function tellState() {
  const { id, size } = settings.model;
  find("state").textContent = `${id} · ${size.replace("x", " × ")}`;
}

/** Start a task, unless one is under way; what comes of it is shown in the gallery. */
function begin(task) {
  if (current) return null;
  const run = current = new Run(task);
  find("notices").replaceChildren();
  gallery.add(run, resolution());
  watch(run);
  say(`Making ${pictures(run.total)}`);
  run.start();
  return run;
}

function watch(run) {
  const tell = () => {
    find("bar").value = run.share;
    find("progress-text").textContent = run.begun ? `${run.count} of ${run.total}` : "Waiting for a place";
  };
  run.addEventListener("progress", tell);
  run.addEventListener("end", () => end(run));
  tell();
  busy(true);
}

function end(run) {
  current = null;
  busy(false);
  if (run.state === "done") say(`${pictures(run.total)} done in ${run.seconds.toFixed(1)} seconds`);
  if (run.state === "cancelled") say("Cancelled");
  if (run.state === "failed" && !find("studio").open) explain(run.error, () => begin(run.task));
}

/** The same again with another seed. */
function again(task) {
  begin({ ...task, fields: { ...task.fields, seed: drawnSeed() } });
}

function busy(yes) {
  const held = find("progress").contains(document.activeElement) || document.activeElement === find("generate");
  find("generate").hidden = yes;
  find("progress").hidden = !yes;
  document.body.classList.toggle("busy", yes);
  if (held) find(yes ? "cancel" : "generate").focus();
}

/** Show an error with what can be done about it. */
function explain(error, retry) {
  if (error.field) point(error.field);
  const more = error.status === 401 ? [["Give a key", askForKey]] : [];
  showNotice(find("notices"), error, { retry: RETRIED.includes(error.status) ? retry : null, more });
}

/** Point at the control of a field that the service names. */
function point(field) {
  const control = settings.form.elements[field];
  if (!(control instanceof HTMLElement)) return;
  find("more").open = true;
  control.setAttribute("aria-invalid", "true");
  control.addEventListener("input", () => control.removeAttribute("aria-invalid"), { once: true });
}

function pictures(count) {
  return count === 1 ? "1 picture" : `${count} pictures`;
}

function resolution() {
  return Number(settings.model.size.split("x")[0]);
}

function askForKey() {
  find("key").value = key();
  find("key-dialog").showModal();
}

/** Open a file to work on; large where the browser can show it, or told in words. */
async function openFile(file) {
  if (!file || !settings.model) return;
  const url = URL.createObjectURL(file), image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    showNotice(find("notices"), { status: 400, message: `${file.name} is no picture that this browser can show` });
    return;
  }
  studio.open({ blob: file, url, name: file.name, width: image.naturalWidth, height: image.naturalHeight }, "denoise");
}

function listen() {
  settings.form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (current || find("generate").disabled) return;
    settings.renew();
    const run = begin(generate(settings.read()));
    history.replaceState(null, "", settings.link());
    if (run && matchMedia("(max-width: 860px)").matches) find("gallery").scrollIntoView({ block: "start" });
  });
  settings.form.addEventListener("settings", () => {
    if (!settings.model) return;
    tellState();
    gallery.preview(settings.read(), resolution());
  });
  find("cancel").addEventListener("click", () => current?.cancel());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) (find("studio").open ? find("studio-form") : settings.form).requestSubmit();
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) current?.cancel();
  });
  listenToKey();
  listenToFiles();
}

function listenToKey() {
  find("key-button").addEventListener("click", askForKey);
  find("key-close").addEventListener("click", () => find("key-dialog").close());
  find("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    keep(find("key").value.trim());
    find("key-dialog").close();
    connect();
  });
}

function listenToFiles() {
  const input = find("file");
  input.addEventListener("change", () => {
    openFile(input.files[0]);
    input.value = "";
  });
  let depth = 0;
  const show = (change) => find("drop").hidden = (depth = Math.max(0, depth + change)) === 0;
  const holdsFile = (event) => [...event.dataTransfer.types].includes("Files");
  addEventListener("dragenter", (event) => holdsFile(event) && show(1));
  addEventListener("dragleave", (event) => holdsFile(event) && show(-1));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    show(-depth);
    openFile(event.dataTransfer.files[0]);
  });
}

if (matchMedia("(max-width: 860px)").matches) find("more").open = false;
listen();
connect();
