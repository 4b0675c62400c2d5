// The API key: kept in this tab alone, and forgotten with it.

const NAME = "api-key";

/** The key that was given, or an empty text. */
export function key() {
  try {
    return sessionStorage.getItem(NAME) ?? "";
  } catch {
    return "";  // storage is switched off in this browser
  }
}

/** Keep a key for this tab; an empty one is forgotten. */
export function keep(value) {
  try {
    if (value) sessionStorage.setItem(NAME, value);
    else sessionStorage.removeItem(NAME);
  } catch {
    return;
  }
}

/** The headers that carry it. */
export function bearer() {
  return key() ? { Authorization: `Bearer ${key()}` } : {};
}
