// A task under way: its previews, its pictures, and how it ended.

import { ServiceError, stream } from "./api.js";

/**
 * Makes the pictures of a task. Dispatches "preview" and "picture" (detail: index and what to show), "progress",
 * and one "end"; then `state` is "done", "cancelled" or "failed", with `error`.
 */
export class Run extends EventTarget {
  constructor(task) {
    super();
    this.task = task;
    this.total = task.fields.n;
    this.pictures = [];
    this.state = "running";
    this.begun = false;
    this.error = null;
    this.seconds = 0;
    this.shares = new Array(this.total).fill(0);
    this.controller = new AbortController();
  }

  /** How much is done, 0 to 1. */
  get share() {
    return this.shares.reduce((sum, each) => sum + each, 0) / this.total;
  }

  /** Pictures that are done. */
  get count() {
    return this.pictures.filter(Boolean).length;
  }

  async start() {
    const began = performance.now();
    try {
      for await (const told of stream(this.task, this.controller.signal, this.#previews())) this.#take(told);
      if (this.count < this.total) throw new ServiceError(0, "the answer broke off");
      this.state = "done";
    } catch (error) {
      this.state = this.controller.signal.aborted ? "cancelled" : "failed";
      this.error = error;
    }
    this.seconds = (performance.now() - began) / 1000;
    this.#tell("end");
  }

  cancel() {
    this.controller.abort();
  }

  /** Previews of each picture: fewer where there are many pictures. */
  #previews() {
    const most = this.total <= 4 ? 16 : this.total <= 16 ? 8 : 4;
    return Math.max(0, Math.min(most, (this.task.fields.steps ?? 18) - 1));
  }

  #take(told) {
    this.begun = true;
    if (told.preview) {
      this.shares[told.index] = told.step / told.steps;
      this.#tell("preview", { index: told.index, url: `data:image/png;base64,${told.b64_json}` });
    } else {
      this.shares[told.index] = 1;
      this.pictures[told.index] = picture(this.task, told);
      this.#tell("picture", { index: told.index, picture: this.pictures[told.index] });
    }
    this.#tell("progress");
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

/** A picture with all that made it; `seed` is its own, by which it can be varied. */
function picture(task, told) {
  const blob = new Blob([bytes(told.b64_json)], { type: "image/png" });
  const [width, height] = told.size.split("x").map(Number);
  const { index, seed, model, version, usage } = told;
  return { task, index, seed, model, version, width, height, blob, url: URL.createObjectURL(blob), calls: usage.denoiser_calls };
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}
