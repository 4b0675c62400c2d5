// Where every picture begins: a tile of Gaussian noise, the same for the same seed.

const SIDE = 32;

/** A canvas of noise keyed by a text. */
export function noise(key) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIDE;
  const context = canvas.getContext("2d");
  const image = context.createImageData(SIDE, SIDE);
  const next = numbers(key);
  for (let at = 0; at < image.data.length; at += 4) {
    for (let channel = 0; channel < 3; channel++) image.data[at + channel] = 128 + 52 * gaussian(next);
    image.data[at + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Uniform numbers in (0, 1) (mulberry32, keyed by FNV-1a of the text). */
function numbers(key) {
  let state = 2166136261;
  for (const letter of key) state = Math.imul(state ^ letter.codePointAt(0), 16777619);
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return (((mixed ^ (mixed >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
}

/** Box-Muller. */
function gaussian(next) {
  return Math.sqrt(-2 * Math.log(next())) * Math.cos(2 * Math.PI * next());
}
