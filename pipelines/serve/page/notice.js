// Errors in words, with what can be done about them.

import { element } from "./elements.js";

const TITLES = {
  0: "The service cannot be reached", 400: "This cannot be made", 401: "A key is needed", 408: "Too slow on the way",
  413: "Too large", 429: "Enough for this minute", 503: "Busy right now", 504: "Not done in time",
};
const HINTS = {
  0: "Is it running, and are you connected? Nothing that was made is lost.",
  401: "Give the key that you were handed for this service.",
};

/** What an error means: a title and a sentence. */
export function words(error) {
  const title = TITLES[error.status] ?? "That did not work";
  return { title, text: HINTS[error.status] ?? sentence(error.message) };
}

/**
 * Show an error in a container, in place of the one before. `retry` is called by its button, once the time that the
 * service asked for is over; `more` are further buttons as [text, action].
 */
export function showNotice(container, error, { retry = null, more = [] } = {}) {
  const { title, text } = words(error);
  const buttons = more.map(([name, action]) => button(name, action));
  if (retry) buttons.push(waiting(button("Try again", retry), error.wait ?? 0));
  const close = button("Dismiss", () => container.replaceChildren());
  close.className = "quiet";
  const row = element("div", { className: "row" }, ...buttons, close);
  const about = [element("h3", {}, title), element("p", {}, text)];
  container.replaceChildren(element("div", { className: "notice", role: "alert" }, ...about, row));
}

function sentence(message) {
  const clean = message.trim();
  return clean.charAt(0).toUpperCase() + clean.slice(1) + (/[.!?]$/.test(clean) ? "" : ".");
}

function button(text, action) {
  const made = element("button", { type: "button" }, text);
  made.addEventListener("click", action);
  return made;
}

/** A button that counts down before it can be pressed. */
function waiting(made, seconds) {
  const text = made.textContent;
  let left = Math.ceil(seconds);
  const tell = () => {
    made.disabled = left > 0;
    made.textContent = left > 0 ? `${text} in ${left} s` : text;
    if (left-- > 0) setTimeout(tell, 1000);
  };
  tell();
  return made;
}
