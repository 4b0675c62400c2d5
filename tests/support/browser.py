"""A real Chromium, and what a page shows in it."""

import contextlib
import shutil

import numpy as np
from playwright.sync_api import sync_playwright

CHROMIUM = shutil.which("chromium")
_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
_READ = """image => {
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth ?? image.width;
    canvas.height = image.naturalHeight ?? image.height;
    canvas.getContext("2d").drawImage(image, 0, 0);
    return [canvas.width, canvas.height, [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]];
}"""  # noqa: E501


@contextlib.contextmanager
def browser():
    """A running Chromium without a window."""
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        try:
            yield running
        finally:
            running.close()


@contextlib.contextmanager
def tab(running, url, **settings):
    """A page opened at `url`, whose `requests` and `complaints` (of scripts, and of its policy) are kept."""
    context = running.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce", **settings)
    page = context.new_page()
    page.set_default_timeout(15_000)
    page.requests, page.complaints = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda told: told.type == "error" and page.complaints.append(told.text))
    page.goto(url)
    try:
        yield page
    finally:
        context.close()


def pixels(locator):
    """What a picture or a canvas holds: uint8 [H, W, 4]."""
    width, height, values = locator.evaluate(_READ)
    return np.array(values, dtype=np.uint8).reshape(height, width, 4)
