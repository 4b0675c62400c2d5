// Elements of the page, made in one line each.

let numbered = 0;

/** An element with properties (`data-…` and `aria-…` as attributes) and children. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-")) made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

/** The element of an id. */
export function find(id) {
  return document.getElementById(id);
}

/** Fill a container with radio buttons that look like chips; choices are [value, text]. */
export function chips(container, name, choices, chosen) {
  const made = choices.map(([value, text]) =>
    element("label", {}, element("input", { type: "radio", name, value, checked: value === chosen }), element("span", {}, text)));
  container.replaceChildren(...made);
}

/** Fill a select; choices are [value, text]. */
export function fill(select, choices, chosen) {
  select.replaceChildren(...choices.map(([value, text]) => element("option", { value, textContent: text })));
  select.value = chosen;
}

/** A labelled select. */
export function picker(text, name, choices, chosen) {
  const id = `field-${++numbered}`, select = element("select", { id, name });
  fill(select, choices, chosen);
  return element("div", { className: "field" }, element("label", { htmlFor: id }, text), select);
}

/** A labelled slider that shows its value. */
export function slider(text, name, { min, max, step, value }) {
  const id = `field-${++numbered}`;
  const input = element("input", { type: "range", id, name, min, max, step });
  input.value = value;
  const output = element("output", { htmlFor: id }, input.value);
  input.addEventListener("input", () => output.value = input.value);
  return element("div", { className: "field slider" }, element("label", { htmlFor: id }, text), output, input);
}

/** A labelled row of radio buttons; choices are [value, text]. */
export function segments(text, name, choices, chosen) {
  const row = element("div", { className: "segments" });
  chips(row, name, choices, chosen);
  return element("fieldset", { className: "field" }, element("legend", {}, text), row);
}

/** A seed that was drawn, as text: short enough to be read out. */
export function drawnSeed() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000);
}
