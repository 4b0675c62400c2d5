// The form beside the pictures: what is to be made, and how.

import { chips, drawnSeed, element, fill, find } from "./elements.js";

const COUNTS = [1, 2, 4, 8, 16, 32];
const COUNT = 8;
const CHIPS_AT_MOST = 16;

/** The settings of the form with the id "settings". */
export class Settings {
  constructor() {
    this.form = find("settings");
    this.models = [];
    chips(find("counts"), "n", COUNTS.map((count) => [String(count), String(count)]), String(COUNT));
    find("seed").value = drawnSeed();
    find("dice").addEventListener("click", () => this.roll());
    find("seed").addEventListener("input", () => this.used = null);
    this.form.addEventListener("input", () => this.#tell());
    this.form.elements.model.addEventListener("change", () => this.#fit());
  }

  /** Offer what the service has: its models, and the API's own choices and defaults. */
  offer(models, fields) {
    this.models = models;
    const { model, sampler, steps, guidance_scale } = this.form.elements;
    fill(model, models.map(({ id }) => [id, id]), models.some(({ id }) => id === model.value) ? model.value : models[0].id);
    if (!sampler.options.length) {
      fill(sampler, fields.sampler.enum.map((name) => [name, name]), fields.sampler.default);
      steps.value = fields.steps.default;
      guidance_scale.value = fields.guidance_scale.default;
      this.#follow();
    }
    find("model-field").hidden = models.length < 2;
    this.#fit();
  }

  /** The chosen model, as the service describes it. */
  get model() {
    return this.models.find(({ id }) => id === this.form.elements.model.value);
  }

  /** Choices of a class: [value, text]. */
  get prompts() {
    return [["", "anything"], ...this.model.classes.map((name) => [name, name])];
  }

  /** The settings as fields of a request; those that do nothing are left out. */
  read() {
    const all = Object.fromEntries(new FormData(this.form));
    const fields = { model: all.model, prompt: all.prompt ?? "", n: Number(all.n), seed: all.seed, sampler: all.sampler, steps: Number(all.steps) };
    if (this.model.classes.length) fields.guidance_scale = Number(all.guidance_scale);
    if (all.negative_prompt && fields.guidance_scale !== 1) fields.negative_prompt = all.negative_prompt;
    return fields;
  }

  /** Take over the settings of a picture; its seed holds for the next run. */
  take(fields) {
    for (const [name, value] of Object.entries(fields)) {
      const control = this.form.elements[name];
      if (control) control.value = String(value);
    }
    this.used = null;
    this.#tell();
  }

  /** Another seed. */
  roll() {
    find("seed").value = drawnSeed();
    this.#tell();
  }

  /** Before pictures are made: another seed, unless this one is to be kept, was typed, or was not used yet. */
  renew() {
    if (this.used && this.used === find("seed").value && !find("lock").checked) this.roll();
    this.used = find("seed").value;
  }

  /** The settings of an address's part behind #, as `link` wrote it. */
  open(hash) {
    const given = new URLSearchParams(hash.replace(/^#/, ""));
    if (given.has("seed")) this.take(Object.fromEntries(given));
  }

  /** The part of an address behind # that brings these settings back. */
  link() {
    return `#${new URLSearchParams(this.read())}`;
  }

  /** Show the classes of the chosen model. */
  #fit() {
    const before = this.form.elements.prompt?.value ?? "";
    const known = this.model.classes.includes(before) ? before : "";
    const container = find("prompts");
    if (this.model.classes.length <= CHIPS_AT_MOST) chips(container, "prompt", this.prompts, known);
    else container.replaceChildren(this.#select(known));
    fill(find("negative"), [["", "nothing"], ...this.prompts.slice(1)], "");
    for (const id of ["prompt-field", "negative-field"]) find(id).hidden = !this.model.classes.length;
    find("guidance").closest(".field").hidden = !this.model.classes.length;
    this.#tell();
  }

  #select(known) {
    const select = element("select", { name: "prompt", "aria-label": "Class" });
    fill(select, this.prompts, known);
    return select;
  }

  #follow() {
    for (const output of this.form.querySelectorAll("output")) output.value = find(output.htmlFor.value).value;
    const off = Number(find("guidance").value) === 1;
    find("negative").disabled = off;
    find("negative").title = off ? "Needs guidance other than 1" : "";
  }

  #tell() {
    this.#follow();
    this.form.dispatchEvent(new Event("settings"));
  }
}
