// One picture, large: repaint, vary, restyle and denoise it; see and copy what made it.

import { curl, python } from "./code.js";
import { chips, element, find } from "./elements.js";
import { key } from "./key.js";
import { Mask } from "./mask.js";
import { MODES, valuesOf } from "./modes.js";
import { showNotice } from "./notice.js";
import { title } from "./tasks.js";

const PIXELATED_TO = 128;

/** The dialog; `settings` are the page's, `begin` starts a task and returns its run, `say` tells the live region. */
export class Studio {
  constructor(settings, begin, say) {
    Object.assign(this, { settings, begin, say, dialog: find("studio"), mode: "look", run: null });
    this.mask = new Mask(find("mask"), find("ring"));
    this.#listen();
  }

  /** Open a picture that was made, or a file as `{blob, url, name, width, height}`; in a mode. */
  open(subject, mode = "look") {
    this.run?.cancel();
    this.run = null;
    this.dialog.dataset.run = "";
    this.subject = this.chosen = subject;
    this.results = [];
    find("studio-notices").replaceChildren();
    find("shown").classList.toggle("pixelated", Math.max(subject.width, subject.height) <= PIXELATED_TO);
    find("canvas").style.setProperty("--ratio", `${subject.width} / ${subject.height}`);
    find("canvas").style.setProperty("--portrait", Math.min(1, subject.width / subject.height));
    this.mask.fit(subject.width, subject.height);
    chips(find("modes"), "mode", Object.entries(MODES).map(([value, { name }]) => [value, name]), mode);
    this.#choose(subject);
    this.#enter(mode);
    if (!this.dialog.open) this.dialog.showModal();
    find("studio-title").focus();
  }

  #listen() {
    find("studio-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => this.run?.cancel());
    find("modes").addEventListener("change", (event) => this.#enter(event.target.value));
    find("studio-form").addEventListener("submit", (event) => this.#go(event));
    find("studio-form").addEventListener("input", () => this.#fit());
    find("studio-cancel").addEventListener("click", () => this.run?.cancel());
    find("adopt").addEventListener("click", () => this.open(this.chosen, this.mode));
    find("reuse").addEventListener("click", () => this.#reuse());
    find("copy").addEventListener("click", () => this.#copy());
    find("code").addEventListener("change", () => this.#tellCode());
    this.#listenToBrush();
  }

  #listenToBrush() {
    const size = find("brush-size");
    size.addEventListener("input", () => this.mask.size = size.value / 100);
    find("mask").addEventListener("resize-brush", ({ detail }) => {
      size.value = Math.max(Number(size.min), Math.round(size.value * detail) + (detail > 1));
      this.mask.size = size.value / 100;
    });
    find("mask").addEventListener("mask", () => this.#fit());
    find("brush").addEventListener("change", ({ target }) => {
      if (target.name === "brush") this.mask.erasing = target.value === "erase";
    });
    find("undo").addEventListener("click", () => this.mask.undo());
    find("clear").addEventListener("click", () => this.mask.clear());
  }

  /** Show the controls of a mode. */
  #enter(mode) {
    this.mode = mode;
    const { fields, hint, verb, why } = MODES[mode];
    const obstacle = why(this.subject);
    this.dialog.dataset.mode = mode;
    find("mode-hint").textContent = obstacle || hint();
    find("mode-fields").replaceChildren(...(fields && !obstacle ? fields(this.subject, this.settings) : []));
    find("studio-form").hidden = mode === "look";
    find("studio-go").textContent = verb ?? "";
    find("brush").hidden = mode !== "repaint";
    if (mode === "look") this.#tellCode();
    else this.#choose(this.subject);
    this.#fit();
  }

  /** Let the controls agree with one another, the mask and what runs. */
  #fit() {
    if (!this.subject) return;
    const { elements } = find("studio-form"), painting = this.mode === "repaint";
    const level = find("mode-fields").querySelector(".known");
    if (level) level.hidden = !elements.known.value;
    find("mask").hidden = !painting || this.chosen !== this.subject;
    const needsMask = painting && this.mask.empty;
    find("studio-go").disabled = needsMask || Boolean(MODES[this.mode].why(this.subject));
    find("studio-go").title = needsMask ? "Paint over a part of the picture first" : "";
    find("studio-go").hidden = Boolean(this.run);
    find("studio-progress").hidden = !this.run;
  }

  async #go(event) {
    event.preventDefault();
    if (this.run || find("studio-go").disabled) return;
    this.dialog.dataset.run = "starting";
    const mask = this.mode === "repaint" ? await this.mask.file() : null;
    const task = MODES[this.mode].task(this.subject, this.settings, valuesOf(event.target), mask);
    find("studio-notices").replaceChildren();
    const run = this.begin(task);
    if (!run) {
      showNotice(find("studio-notices"), { status: 503, message: "something else is being made; wait for it, or cancel it" });
      return;
    }
    this.run = run;
    this.results = new Array(run.total).fill(null);
    this.watching = 0;
    this.#follow(run);
    this.#tellStrip();
    this.#fit();
    this.dialog.scrollTop = 0;
  }

  #follow(run) {
    const hear = (name, action) => run.addEventListener(name, ({ detail }) => this.run === run && action(detail ?? {}));
    hear("preview", ({ index, url }) => this.#arrive(index, { url, coming: true }));
    hear("picture", ({ index, picture }) => this.#arrive(index, picture));
    hear("progress", () => {
      find("studio-bar").value = run.share;
      find("studio-progress-text").textContent = `${run.count} of ${run.total}`;
    });
    hear("end", () => this.#end(run));
    find("studio-bar").value = 0;
    find("studio-progress-text").textContent = "Waiting for a place";
  }

  /** A preview or a finished picture of the run: in the strip, and large where nothing else was chosen since. */
  #arrive(index, shown) {
    this.results[index] = shown;
    if (index === this.watching) this.#choose(shown);
    this.#tellStrip();
  }

  #end(run) {
    this.run = null;
    this.dialog.dataset.run = run.state;
    this.results = this.results.filter((each) => each && !each.coming);
    this.#choose(this.chosen.coming ? this.results[0] ?? this.subject : this.chosen);
    if (run.state === "failed" && this.dialog.open) {
      const again = () => find("studio-form").requestSubmit();
      showNotice(find("studio-notices"), run.error, { retry: [0, 429, 503, 504].includes(run.error.status) ? again : null });
    }
    this.#fit();
  }

  /** Show a picture large: the subject, a preview or a result. */
  #choose(shown) {
    this.chosen = shown;
    find("shown").src = shown.url;
    find("studio-title").textContent = this.subject.task ? title(this.subject.task) : this.subject.name;
    find("shown").alt = shown === this.subject ? find("studio-title").textContent : `Result: ${shown.task ? title(shown.task) : "on its way"}`;
    find("about").hidden = Boolean(shown.coming);
    find("adopt").hidden = shown === this.subject || Boolean(this.run);
    find("mask").hidden = this.mode !== "repaint" || shown !== this.subject;
    this.#tellStrip();
    if (!shown.coming) this.#tellAbout(shown);
  }

  #tellStrip() {
    const all = [this.subject, ...this.results];
    find("strip").hidden = all.length < 2;
    const focused = [...find("strip").children].findIndex((each) => each.contains(document.activeElement));
    find("strip").replaceChildren(...all.map((each, at) => this.#thumb(each, at)));
    if (focused >= 0) find("strip").children[focused]?.firstChild.focus();
  }

  #thumb(shown, at) {
    const name = at ? `Result ${at}` : "Before";
    const properties = { type: "button", "aria-label": name, "aria-pressed": String(shown === this.chosen), disabled: !shown };
    const thumb = element("button", properties, shown ? element("img", { src: shown.url, alt: "" }) : "");
    thumb.classList.toggle("pixelated", find("shown").classList.contains("pixelated"));
    thumb.addEventListener("click", () => {
      this.watching = at - 1;
      this.#choose(shown);
    });
    return element("li", {}, thumb, element("span", {}, at ? String(at) : "Before"));
  }

  #tellAbout(shown) {
    const { task } = shown;
    const kind = task ? title(task).replaceAll(/[^\w]+/g, "-") : "picture";
    const link = find("download");
    link.href = shown.url;
    link.download = task ? `${kind}-${task.fields.seed}-${shown.index + 1}.png` : shown.name;
    find("reuse").hidden = task?.kind !== "generate";
    find("code").hidden = !task;
    find("details").replaceChildren(...details(shown).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
    this.#tellCode();
  }

  #tellCode() {
    const { chosen } = this;
    if (!chosen?.task) return;
    const language = find("code").querySelector("input:checked").value;
    const service = new URL("./", location.href).href;
    find("code-text").textContent = (language === "curl" ? curl : python)(chosen, service, Boolean(key()));
    const files = Object.entries(chosen.task.files ?? {});
    find("code-files").hidden = !files.length;
    find("code-files").replaceChildren("Needs beside it: ", ...files.map(([name, blob]) => save(name, blob)));
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(find("code-text").textContent);
      find("copy").textContent = "Copied";
      this.say("Copied");
    } catch {
      getSelection().selectAllChildren(find("code-text"));
      find("copy").textContent = "Press Ctrl C";
    }
    setTimeout(() => find("copy").textContent = "Copy", 2000);
  }

  #reuse() {
    this.settings.take(this.chosen.task.fields);
    this.dialog.close();
    this.say("The settings of this picture are set");
  }
}

/** What made a picture, in rows. */
function details({ task, seed, model, version, width, height, calls }) {
  const size = ["Size", `${width} × ${height}`];
  if (!task) return [size];
  const names = {
    steps: "Steps", sampler: "Sampler", guidance_scale: "Guidance", negative_prompt: "Away from", strength: "Strength",
    inpainting: "Method", noise_level: "Noise level", parent: "Parent",
  };
  const rows = Object.entries(names).filter(([name]) => name in task.fields).map(([name, text]) => [text, String(task.fields[name])]);
  return [["Model", `${model} ${version.slice(0, 8)}`], ...rows, ["Seed", task.fields.seed], ["Its own seed", seed], ["Denoiser calls", String(calls)], size];
}

/** A link that saves a file that a call needs. */
function save(name, blob) {
  return element("a", { href: URL.createObjectURL(blob), download: `${name}.png` }, `${name}.png`);
}
