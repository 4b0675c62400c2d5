// The pictures that were made, run by run, the newest on top; noise where they are still to come.

import { element, find } from "./elements.js";
import { noise } from "./noise.js";
import { title } from "./tasks.js";

const GAP = 12;
const LIKED = 184;
const LEAST = 84;
const MOST = 256;
const PIXELATED_TO = 128;

/** Shows runs in the page's gallery; `open` is called with the picture that is chosen, `again` with a task. */
export class Gallery {
  constructor(open, again) {
    Object.assign(this, { open, again, container: find("runs"), empty: find("empty") });
    new ResizeObserver(() => this.#layAll()).observe(find("gallery"));
  }

  /** While nothing was made yet: the noise that it would begin with. */
  preview({ n, seed }, resolution) {
    if (this.empty.hidden) return;
    const tiles = this.empty.querySelector(".tiles");
    tiles.replaceChildren(...Array.from({ length: n }, (_, index) => element("div", { className: "tile" }, noise(`${seed} ${index}`))));
    this.#lay(tiles, n, resolution);
  }

  /** Show a run from its beginning; returns its section. */
  add(run, resolution) {
    this.empty.hidden = true;
    const tiles = element("div", { className: "tiles" });
    const about = element("p", {}, describe(run.task.fields));
    const again = element("button", { type: "button", className: "quiet", title: "The same with another seed" }, "Again");
    again.addEventListener("click", () => this.again(run.task));
    const head = element("header", {}, element("h2", {}, title(run.task)), about, again);
    const section = element("section", { className: "run", "aria-label": title(run.task) }, head, tiles);
    section.dataset.state = "running";
    tiles.append(...Array.from({ length: run.total }, (_, index) => tile(run, index)));
    this.container.prepend(section);
    this.#lay(tiles, run.total, resolution);
    this.#follow(run, section, tiles, about);
    return section;
  }

  #follow(run, section, tiles, about) {
    run.addEventListener("preview", ({ detail }) => show(tiles.children[detail.index], detail.url));
    run.addEventListener("picture", ({ detail: { index, picture } }) => {
      const finished = done(picture, run);
      finished.addEventListener("click", () => this.open(picture, run));
      tiles.children[index].replaceWith(finished);
    });
    run.addEventListener("end", () => {
      section.dataset.state = run.state;
      about.textContent = `${describe(run.task.fields)} · ${run.seconds.toFixed(1)} s`;
      tiles.querySelectorAll(".coming").forEach((each) => each.remove());
      if (!run.count) section.remove();
      this.empty.hidden = this.container.children.length > 0;
    });
  }

  #layAll() {
    for (const tiles of find("gallery").querySelectorAll(".tiles")) {
      if (tiles.dataset.resolution) this.#lay(tiles, tiles.children.length, Number(tiles.dataset.resolution));
    }
  }

  /** Tiles of whole multiples of the pictures' pixels, in columns that leave few gaps. */
  #lay(tiles, count, resolution) {
    const width = find("gallery").clientWidth;
    const [columns, side] = grid(width, count, resolution);
    tiles.dataset.resolution = resolution;
    tiles.classList.toggle("pixelated", resolution <= PIXELATED_TO);
    tiles.style.setProperty("--side", `${side}px`);
    tiles.style.setProperty("--columns", columns);
  }
}

/** Columns, and the side of a tile in CSS pixels. */
function grid(width, count, resolution) {
  const whole = resolution <= PIXELATED_TO ? resolution / Math.max(1, Math.round(devicePixelRatio)) : 1;
  let best = [1, MOST], least = Infinity;
  for (let columns = 1; columns <= Math.max(1, count); columns++) {
    const room = Math.min(MOST, (width - GAP * (columns - 1)) / columns);
    const side = Math.floor(room / whole) * whole || Math.floor(room);
    const cost = Math.abs(Math.log(side / LIKED)) + (count % columns ? 0.3 : 0) + (side < LEAST ? 9 : 0);
    if (cost <= least) [best, least] = [[columns, side], cost];
  }
  return best;
}

function tile(run, index) {
  return element("div", { className: "tile coming" }, noise(`${run.task.fields.seed} ${index}`));
}

/** A preview in a tile, in place of the noise. */
function show(coming, url) {
  const image = coming.querySelector("img") ?? coming.appendChild(element("img", { alt: "" }));
  image.src = url;
}

function done(picture, run) {
  const name = `${title(run.task)}, picture ${picture.index + 1} of ${run.total}`;
  const image = element("img", { src: picture.url, alt: name, draggable: false });
  return element("button", { type: "button", className: "tile", "aria-label": `Open ${name}` }, image);
}

function describe({ steps, sampler, guidance_scale, seed, strength, noise_level }) {
  return [
    `${steps} ${steps === 1 ? "step" : "steps"}`, sampler, guidance_scale === undefined ? "" : `guidance ${guidance_scale}`,
    strength === undefined ? "" : `strength ${strength}`, noise_level === undefined ? "" : `noise ${noise_level}`, `seed ${seed}`,
  ].filter(Boolean).join(" · ");
}
