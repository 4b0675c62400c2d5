// What is asked of the service: a path, its fields, and files; as the API has them.

const GENERATIONS = "v1/images/generations";
const EDITS = "v1/images/edits";
const DENOISE = "v1/images/denoise";

/** Pictures of a class. */
export function generate(settings) {
  return { kind: "generate", path: GENERATIONS, fields: settings };
}

/** Pictures near one that was generated, from noise close to its own, by its own settings. */
export function vary(picture, { prompt, strength, n, seed }) {
  const fields = { ...picture.task.fields, prompt, n, seed, parent: picture.seed, strength };
  return { kind: "vary", path: GENERATIONS, fields };
}

/** The transparent part of `mask` painted anew. */
export function repaint(image, mask, settings, { prompt, inpainting, n, seed }) {
  const fields = { ...settings, prompt, n, seed, inpainting };
  return { kind: "repaint", path: EDITS, fields, files: { image, mask } };
}

/** A picture as the start of another. */
export function restyle(image, settings, { prompt, strength, n, seed }) {
  return { kind: "restyle", path: EDITS, fields: { ...settings, prompt, n, seed, strength }, files: { image } };
}

/** A picture without its noise; `level` is null where the service is to estimate it. */
export function denoise(image, { model }, { prompt, level, steps, n, seed }) {
  const known = level === null ? {} : { noise_level: level };
  const fields = { model, prompt, n, seed, steps, ...known };
  return { kind: "denoise", path: DENOISE, fields, files: { image } };
}

/** What a picture of a task is called. */
export function title({ kind, fields }) {
  const what = fields.prompt || "anything";
  const titles = {
    generate: what, vary: `${what}, varied`, repaint: `${what}, repainted`, restyle: `restyled as ${what}`, denoise: "denoised",
  };
  return titles[kind];
}
