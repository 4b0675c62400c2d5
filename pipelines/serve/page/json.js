// JSON with seeds as text: they reach 2^62, and a JavaScript number holds 53 bits of them.

/** What a JSON text says, `seed` and `parent` as strings of digits. */
export function parse(text) {
  return JSON.parse(text.replace(/"(seed|parent)":\s*(\d+)/g, '"$1":"$2"'));
}

/** The JSON text of a value, such strings as numbers again. */
export function write(value, indent) {
  return JSON.stringify(value, null, indent).replace(/"(seed|parent)":(\s*)"(\d+)"/g, '"$1":$2$3');
}
