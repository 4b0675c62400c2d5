import base64
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from support.browser import CHROMIUM, browser, pixels, tab
from support.models import publish
from support.service import local_service

from pipelines.config import KeyConfig
from pipelines.images import from_png, to_png
from pipelines.requests import ImageRequest
from pipelines.serve.keys import make_key
from pipelines.worker import load_worker, picture_seed

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it, as with apt-get install chromium")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return publish(str(tmp_path_factory.mktemp("store")), 1)


@pytest.fixture(scope="module")
def worker(model):
    return load_worker(model)


@pytest.fixture(scope="module")
def service(model):
    with local_service(model, max_pictures=16) as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


@pytest.fixture
def page(chromium, service):
    with tab(chromium, service.url) as opened:
        opened.locator("#generate:enabled").wait_for()
        yield opened
        assert opened.complaints == []


def ask(page, prompt="cat", n=2, steps=6, seed="12", guidance=2):
    """Set the form and press Generate."""
    page.locator("#prompts").get_by_text(prompt, exact=True).click()
    page.locator("#counts").get_by_text(str(n), exact=True).click()
    page.locator("#steps").fill(str(steps))
    page.locator("#guidance").fill(str(guidance))
    page.locator("#seed").fill(seed)
    page.locator("#generate").click()


def made(page, count):
    """The pictures of the newest run, once it is done."""
    page.locator("#runs > section:first-child[data-state='done']").wait_for()
    tiles = page.locator("#runs > section:first-child button.tile img")
    assert tiles.count() == count
    return [tiles.nth(index) for index in range(count)]


def open_first(page, mode):
    page.locator("#runs button.tile").first.click()
    page.locator("#modes").get_by_text(mode, exact=True).click()


def results(page):
    """What a mode of the studio made, from the strip, once it is done."""
    page.locator("#studio[data-run='done']").wait_for()
    thumbs = page.locator("#strip button:not(:disabled) img")
    return [pixels(thumbs.nth(index))[..., :3] for index in range(1, thumbs.count())]


def paint_left(page):
    """Brush down the left of the picture; where it was painted, bool [H, W]."""
    box = page.locator("#mask").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] - 5, steps=8)
    page.mouse.up()
    return pixels(page.locator("#mask"))[..., 3] > 0


def test_pictures_appear_after_their_previews_and_are_those_of_the_model(page, worker):
    page.evaluate("""() => {
        window.previews = [];
        const look = records => previews.push(...records.map(({ target }) => target.closest(".coming") && target.src));
        new MutationObserver(look).observe(document.body, { subtree: true, attributeFilter: ["src"] });
    }""")
    ask(page, n=2, steps=12)
    shown = [pixels(image)[..., :3] for image in made(page, 2)]
    wanted = [ImageRequest(prompt="cat", seed=picture_seed(12, index), steps=12) for index in range(2)]
    for ours, theirs in zip(shown, worker.paint(wanted), strict=True):
        assert np.array_equal(ours, theirs)
    assert len(set(page.evaluate("window.previews.filter(Boolean)"))) > 2
    assert "2 pictures done" in page.locator("#live").inner_text()


def test_the_page_asks_nothing_of_others(page, service):
    assert page.requests
    assert all(url.startswith(service.url) for url in page.requests)
    policy = httpx.get(service.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_its_files_are_asked_for_again_only_where_they_changed(service):
    first = httpx.get(f"{service.url}/page/page.js")
    assert (first.status_code, first.headers["content-type"]) == (200, "text/javascript; charset=utf-8")
    again = httpx.get(f"{service.url}/page/page.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert httpx.head(service.url).status_code == 200
    for name in ("nothing.js", "..%2fapi.py", "%2e%2e/api.py"):
        assert httpx.get(f"{service.url}/page/{name}").status_code == 404, name


def test_repainting_changes_what_was_painted_and_nothing_else(page):
    ask(page, n=1)
    before = pixels(made(page, 1)[0])[..., :3]
    open_first(page, "Repaint")
    assert page.locator("#studio-go").is_disabled(), "nothing is painted yet"
    painted = paint_left(page)
    assert painted.any()
    assert not painted.all()
    page.locator("#studio-go").click()
    after = results(page)
    assert len(after) == 2
    for each in after:
        assert np.array_equal(each[~painted], before[~painted])
        assert not np.array_equal(each[painted], before[painted])


def test_a_mask_is_painted_by_keys_and_undone(page):
    ask(page, n=1)
    made(page, 1)
    open_first(page, "Repaint")
    page.locator("#mask").focus()
    for key in ("ArrowLeft", "ArrowUp", "Space"):
        page.keyboard.press(key)
    dab = pixels(page.locator("#mask"))[..., 3] > 0
    assert dab[:4, :4].any()
    assert not dab[5:, 5:].any()
    page.keyboard.press("Control+z")
    assert not pixels(page.locator("#mask"))[..., 3].any()


def test_a_variation_is_of_the_pictures_own_seed_to_the_last_digit(page, worker):
    ask(page, n=1)
    made(page, 1)
    open_first(page, "Vary")
    with page.expect_request("**/v1/images/generations") as sent:
        page.locator("#studio-go").click()
    body = json.loads(sent.value.post_data)
    assert body["parent"] == picture_seed(12, 0)
    seed = picture_seed(body["seed"], 0)
    wanted = ImageRequest(task="vary", prompt="cat", parent=body["parent"], strength=0.25, seed=seed, steps=6)
    assert np.array_equal(results(page)[0], worker.paint([wanted])[0])


def noisy_file():
    return to_png(np.random.default_rng(3).integers(0, 255, (8, 8, 3), dtype=np.uint8))


def test_a_chosen_file_is_denoised(page, worker):
    page.locator("#file").set_input_files({"name": "noisy.png", "mimeType": "image/png", "buffer": noisy_file()})
    page.get_by_text("I know it").click()
    page.locator("[name=level]").fill("0.3")
    page.locator("#studio-go").click()
    shown = results(page)[0]
    seed = int(page.locator("#details dt:text-is('Seed') + dd").text_content())
    asked = ImageRequest(
        task="denoise", seed=picture_seed(seed, 0), image=noisy_file(), noise_level=0.3, steps=1, guidance_scale=1
    )
    assert np.array_equal(shown, worker.paint([asked])[0])


def test_a_dropped_file_is_opened_and_one_that_is_none_is_told_of(page):
    drop = """([bytes, name]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], name));
        window.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
    }"""
    page.evaluate(drop, [list(b"no picture"), "notes.txt"])
    page.get_by_role("alert").get_by_text("notes.txt is no picture").wait_for()
    page.evaluate(drop, [list(noisy_file()), "noisy.png"])
    page.locator("#studio-title").get_by_text("noisy.png").wait_for()
    assert pixels(page.locator("#shown")).shape == (8, 8, 4)


def test_what_the_service_refuses_is_shown_in_its_words(page):
    ask(page, n=32)
    page.get_by_role("alert").get_by_text("this service makes up to 16 pictures a request").wait_for()
    assert page.locator("#runs button.tile").count() == 0
    assert page.complaints.pop().startswith("Failed to load resource: the server responded with a status of 400")


def test_a_lost_connection_is_told_and_tried_again(page):
    page.context.set_offline(True)
    ask(page, n=1)
    page.get_by_role("alert").get_by_text("cannot be reached").wait_for()
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    made(page, 1)
    page.complaints = [each for each in page.complaints if "ERR_INTERNET_DISCONNECTED" not in each]


def test_cancel_gives_the_places_up(page, service):
    ask(page, n=16, steps=100)
    page.locator(".coming img").first.wait_for()
    page.locator("#cancel").click()
    page.locator("#generate").wait_for()
    wait_until(lambda: service.loop.pending_calls == 0)
    assert service.ticks[-1].pending_calls < 16 * 100
    assert page.locator(".coming").count() == 0


def wait_until(true):
    done = threading.Event()
    for _ in range(1000):
        if true():
            return
        done.wait(0.01)
    raise AssertionError("not within 10 s")


def test_overload_is_shown_with_the_time_to_wait(chromium, model):
    long = {"n": 4, "steps": 1000, "guidance_scale": 1, "stream": True, "partial_images": 100}
    with local_service(model, queue=4, max_pictures=4, lanes=2) as crowded, tab(chromium, crowded.url) as page:
        page.locator("#generate:enabled").wait_for()
        with httpx.stream("POST", f"{crowded.url}/v1/images/generations", json=long, timeout=60):
            ask(page, n=4)
            page.get_by_role("alert").get_by_text("2 pictures wait already").wait_for()
            assert page.get_by_role("button", name=re.compile(r"Try again in \d+ s")).is_disabled()


def test_a_service_with_keys_asks_for_one_and_never_shows_it(chromium, model, tmp_path, capsys):
    keys = str(tmp_path / "keys.json")
    make_key(KeyConfig(key_file=keys, name="ann"))
    secret = capsys.readouterr().out.strip().rsplit(" ", 1)[1]
    with local_service(model, key_file=keys) as guarded, tab(chromium, guarded.url) as page:
        page.get_by_role("alert").get_by_text("A key is needed").wait_for()
        page.get_by_role("button", name="Give a key").click()
        page.locator("#key").fill("sk-wrong")
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("A key is needed").wait_for()
        page.get_by_role("button", name="Give a key").click()
        page.locator("#key").fill(secret)
        page.keyboard.press("Enter")
        page.locator("#generate:enabled").wait_for()
        ask(page, n=1)
        made(page, 1)
        page.locator("#runs button.tile").first.click()
        assert "$IMAGES_API_KEY" in page.locator("#code-text").inner_text()
        assert secret not in page.content()
        assert secret not in page.url


def code(page, language):
    """The code that is shown, run as it is with the files that it needs; the picture that it makes."""
    page.locator("#modes").get_by_text("Picture", exact=True).click()
    page.locator("#code").get_by_text(language, exact=True).click()
    for link in page.locator("#code-files a").all():
        with page.expect_download() as saved:
            link.click()
        saved.value.save_as(saved.value.suggested_filename)
    text = page.locator("#code-text").inner_text()
    if language == "Python":
        exec(text, {})
        return from_png(Path("picture.png").read_bytes())
    call, _, picked = text.partition(" \\\n  | ")
    told = json.loads(subprocess.run(["sh", "-c", call], capture_output=True, check=True, timeout=60).stdout)
    index = int(re.fullmatch(r"jq -r '.data\[(\d+)].b64_json' \| base64 --decode > picture.png", picked).group(1))
    return from_png(base64.b64decode(told["data"][index]["b64_json"]))


LANGUAGES = ["Python", *(["curl"] if shutil.which("curl") else [])]


def test_the_code_that_is_shown_makes_the_same_picture(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask(page, n=4)
    made(page, 4)
    for mode in ("Picture", "Repaint", "Vary", "Restyle", "Denoise"):
        page.locator("#runs > section:last-child button.tile").nth(2).click()
        shown = pixels(page.locator("#shown"))[..., :3]
        if mode != "Picture":
            page.locator("#modes").get_by_text(mode, exact=True).click()
            if mode == "Repaint":
                paint_left(page)
            page.locator("#studio-go").click()
            shown = results(page)[0]
        for language in LANGUAGES:
            assert np.array_equal(code(page, language), shown), (mode, language)
        page.keyboard.press("Escape")


def test_another_run_has_another_seed_unless_it_is_kept(page):
    def seeds():
        page.locator("#generate").click()
        made(page, 1)
        return page.locator("#seed").input_value()

    ask(page, n=1, steps=2)
    made(page, 1)
    other = seeds()
    assert other != "12"
    page.locator("#seed").fill(other)
    assert seeds() == other, "what was typed holds once"
    page.locator("#lock").check(force=True)
    kept = page.locator("#seed").input_value()
    assert seeds() == kept
    page.reload()
    page.locator("#generate:enabled").wait_for()
    assert page.locator("#seed").input_value() == kept, "the address holds the settings"
    assert page.locator("#prompts :checked").input_value() == "cat"


@pytest.mark.parametrize("width", [390, 820, 1440])
def test_nothing_sticks_out_at_any_width(chromium, service, width):
    with tab(chromium, service.url) as page:
        page.set_viewport_size({"width": width, "height": 844})
        page.locator("#generate:enabled").wait_for()
        page.locator("#prompts").get_by_text("cat", exact=True).click()
        page.keyboard.press("Control+Enter")
        made(page, 8)
        overflow = "document.documentElement.scrollWidth - innerWidth"
        assert page.evaluate(overflow) <= 0
        page.locator("#runs button.tile").first.click()
        for mode in ("Picture", "Repaint", "Denoise"):
            page.locator("#modes").get_by_text(mode, exact=True).click()
            assert page.evaluate("document.querySelector('#studio').scrollWidth - innerWidth") <= 0
