import re

from conftest import ROOT
from support.messages import messages

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
FOUND = messages()


def shown():
    """What the page quotes in the first cells of its tables."""
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            yield from (text for text in re.findall(r"`([^`]+)`", line.split(" | ")[0]) if " " in text)


def like(text):
    """Comparable: runs of gaps and spaces are one gap, none at the ends."""
    return re.sub(r"(\s*…\s*)+", "…", text).strip("… ").lower()


def test_every_error_that_can_be_raised_is_explained():
    quoted = {like(text) for text in shown()}
    missing = [f"{message.where}: {message.shown}" for message in FOUND if like(message.shown) not in quoted]
    assert missing == []


def test_every_error_that_is_explained_can_be_raised():
    raised = {like(message.shown) for message in FOUND}
    assert [text for text in shown() if like(text) not in raised] == []


def test_messages_are_found_in_every_form_that_the_code_has_them():
    texts = {message.shown for message in FOUND}
    assert "…: not found; check the address (bucket, folder, spelling)" in texts, "an f-string"
    assert "--dry-run or --delete, not both" in texts, "a plain text"
    assert "…: no published model here; run the train stage first, or give --model" in texts, "a function's"
    assert "…: … steps in a row are not finite, the last at step …" in "".join(texts), "a function's, of two texts"
    assert len(FOUND) > 250
