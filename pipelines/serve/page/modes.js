// What can be done with one picture: the fields of each, and the task that comes of them.

import { denoise, repaint, restyle, vary } from "./tasks.js";
import { drawnSeed, element, picker, segments, slider } from "./elements.js";

const COUNTS = ["1", "2", "4", "8"].map((count) => [count, count]);

/**
 * The modes by name. `why` says what stands in the way for a subject, or nothing; `fields` makes the controls from
 * the subject and the settings; `task` the task from their values. A subject is a picture or a file that was opened.
 */
export const MODES = {
  look: { name: "Picture", hint: () => "", why: () => "" },
  repaint: {
    name: "Repaint", verb: "Repaint", why: () => "",
    hint: () => "Paint over what you want made anew. Everything else stays as it is, to the byte.",
    fields: (subject, settings) => [
      prompt("Paint it as", subject, settings), count("2"),
      segments("Method", "inpainting", [["posterior", "Careful"], ["replacement", "Fast"]], "posterior"),
    ],
    task: (subject, settings, values, mask) => repaint(subject.blob, mask, rest(settings.read()), values),
  },
  vary: {
    name: "Vary", verb: "Vary",
    why: (subject) => subject.task?.kind === "generate" ? "" : "Only a picture that was generated from noise alone can be varied. Restyle this one instead.",
    hint: () => "A walk in the neighbourhood of this picture: other pictures from noise close to its own.",
    fields: (subject, settings) => [strength("How far", 0.25), prompt("Draw", subject, settings), count("4")],
    task: (subject, settings, values) => vary(subject, values),
  },
  restyle: {
    name: "Restyle", verb: "Restyle", why: () => "",
    hint: () => "Starts from this picture in place of noise. Little strength keeps it, much of it makes another.",
    fields: (subject, settings) => [strength("Strength", 0.6), prompt("Draw it as", subject, settings), count("4")],
    task: (subject, settings, values) => restyle(subject.blob, rest(settings.read()), values),
  },
  denoise: {
    name: "Denoise", verb: "Denoise", why: () => "",
    hint: () => "Takes noise out of a picture. Smooth is the best guess by squared error, Sharp one picture of many.",
    fields: (subject, settings) => [
      segments("Noise", "known", [["", "Estimate"], ["1", "I know it"]], ""), level(settings.model.noise_levels[1]),
      segments("Answer", "steps", [["1", "Smooth"], ["18", "Sharp"]], "1"), prompt("It shows", subject, settings),
    ],
    task: (subject, settings, values) => denoise(subject.blob, settings.read(), values),
  },
};

/** The values of a form of one of these. */
export function valuesOf(form) {
  const { prompt = "", n = "1", inpainting, strength, known, level, steps } = Object.fromEntries(new FormData(form));
  return {
    prompt, n: Number(n), seed: drawnSeed(), inpainting, strength: Number(strength), steps: Number(steps),
    level: known ? Number(level) : null,
  };
}

/** Settings that hold for other tasks as well: all but those that a mode asks for itself. */
function rest({ prompt: _, n: __, seed: ___, ...fields }) {
  return fields;
}

function prompt(text, subject, settings) {
  const given = subject.task?.fields.prompt ?? "";
  const made = picker(text, "prompt", settings.prompts, settings.model.classes.includes(given) ? given : "");
  made.hidden = !settings.model.classes.length;
  return made;
}

function count(chosen) {
  return segments("How many", "n", COUNTS, chosen);
}

function strength(text, value) {
  return slider(text, "strength", { min: 0.05, max: 1, step: 0.05, value });
}

/** The slider of a known noise level, for values in [-1, 1]. */
function level(most) {
  const made = slider("Its level", "level", { min: 0.02, max: Math.min(1.5, most), step: 0.02, value: 0.2 });
  made.classList.add("known");
  made.append(element("p", { className: "hint" }, "Standard deviation for values from −1 to 1; 0.2 is 26 of 255."));
  return made;
}
