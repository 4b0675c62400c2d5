import ctypes
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import sessions

from pipelines.config import PipelineError, SampleOptions
from pipelines.images import to_png
from pipelines.requests import ImageRequest, RequestError
from pipelines.worker import load_worker, memory, picture_seed
from pipelines.worker.threads import apart


@pytest.fixture(scope="module")
def worker(tiny_model):
    return load_worker(tiny_model, lanes=8)


def request(seed=1, **fields):
    return ImageRequest(seed=seed, **{"steps": 4, **fields})


def picture(seed=0):
    return np.random.default_rng(seed).integers(256, size=(8, 8, 3), dtype=np.uint8)


def mask(box):
    buffer = io.BytesIO()
    alpha = np.where(box, 0, 255).astype(np.uint8)
    Image.fromarray(np.dstack([np.zeros((*box.shape, 3), dtype=np.uint8), alpha])).save(buffer, format="PNG")
    return buffer.getvalue()


BOX = np.zeros((8, 8), dtype=bool)
BOX[2:6, 3:7] = True


def test_a_picture_is_the_same_alone_and_in_any_crowd(worker):
    kinds = [
        {"prompt": "cat"},
        {"prompt": "frog", "guidance_scale": 1.0},
        {"prompt": "bear", "sampler": "ddpm", "steps": 6},
        {"task": "inpaint", "image": to_png(picture()), "mask": mask(BOX)},
        {"task": "inpaint", "image": to_png(picture()), "mask": mask(BOX), "inpainting": "replacement", "resample": 2},
        {"task": "image_to_image", "image": to_png(picture()), "strength": 0.5, "prompt": "cat"},
        {"task": "vary", "parent": 3, "strength": 0.2, "sampler": "ddpm"},
        {"task": "denoise", "image": to_png(picture())},
        {"task": "denoise", "image": to_png(picture()), "noise_level": 0.4, "steps": 1},
        {"task": "denoise", "image": to_png(picture()), "noise_level": 0.7, "steps": 3},
    ]
    crowd = [request(seed, **kinds[seed % len(kinds)]) for seed in range(40)]
    together = worker.paint(crowd)
    order = np.random.default_rng(0).permutation(len(crowd))
    shuffled = worker.paint([crowd[index] for index in order])
    for place, index in enumerate(order):
        assert np.array_equal(shuffled[place], together[index])
    for index in range(len(kinds)):
        assert np.array_equal(worker.paint([crowd[index]])[0], together[index])


def test_seed_class_and_settings_change_the_picture(worker):
    base = worker.paint([request(prompt="cat")])[0]
    assert np.array_equal(worker.paint([request(prompt="cat")])[0], base)
    for other in (request(2, prompt="cat"), request(prompt="cat", steps=5), request(prompt="cat", sampler="ddpm")):
        assert not np.array_equal(worker.paint([other])[0], base)


def test_inpainting_keeps_every_byte_outside_the_mask(worker):
    original = picture(3)
    painted = worker.paint([request(task="inpaint", image=to_png(original), mask=mask(BOX))])[0]
    assert np.array_equal(painted[~BOX], original[~BOX])
    assert not np.array_equal(painted[BOX], original[BOX])


def test_the_mask_may_be_the_transparency_of_the_picture_itself(worker):
    original = picture(4)
    buffer = io.BytesIO()
    Image.fromarray(np.dstack([original, np.where(BOX, 0, 255).astype(np.uint8)])).save(buffer, format="PNG")
    painted = worker.paint([request(task="inpaint", image=buffer.getvalue())])[0]
    assert np.array_equal(painted[~BOX], original[~BOX])


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prompt": "dog"}, "prompt: no class 'dog'; there are bear, cat"),
        ({"task": "inpaint"}, "image: missing"),
        ({"task": "inpaint", "image": to_png(picture())}, "image: no transparent pixel"),
        ({"task": "inpaint", "image": b"broken"}, "image: undecodable"),
        ({"task": "inpaint", "image": to_png(picture()), "mask": mask(np.ones((4, 4)))}, "mask: 4x4 pixels, .* 8x8"),
        ({"task": "denoise", "image": to_png(picture()), "noise_level": 0.0}, "noise_level: 0.0; need more than 0.002"),
        ({"task": "denoise", "noise_level": 0.1}, "image: missing"),
        ({"image": to_png(picture())}, "image: given, but the task generate has no use for it"),
        ({"task": "image_to_image", "image": to_png(picture())}, "strength: missing"),
        ({"task": "image_to_image", "image": to_png(picture()), "strength": 2.0}, "strength: 2.0; need 0 to 1"),
        ({"task": "vary", "strength": 0.1}, "parent: missing"),
        ({"task": "denoise", "image": to_png(picture()), "noise_level": 99.0}, "noise_level: 99"),
        ({"negative_prompt": "dog"}, "negative_prompt: no class 'dog'; there are bear, cat"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name_before_any_work(worker, fields, told):
    with pytest.raises(RequestError, match=told):
        worker.paint([request(prompt="cat"), request(**fields)])


def test_a_request_that_fails_leaves_the_others_their_pictures(worker):
    good = request(prompt="cat")
    broken = request(task="inpaint", image=b"broken")
    impossible = request(2, prompt="cat").model_copy(update={"guidance_scale": 3e38})  # past the schema, to overflow
    ends = worker.paint_each([broken, good, impossible, good])
    assert isinstance(ends[0], RequestError)
    assert ends[0].field == "image"
    assert "NaN or infinite" in str(ends[2])
    for end in (ends[1], ends[3]):
        assert np.array_equal(end, worker.paint([good])[0])
    with pytest.raises(PipelineError, match="request 1: row"):
        worker.paint([good, impossible])


def test_the_number_of_lanes_is_set_or_measured_and_the_profile_names_it(tiny_model):
    assert load_worker(tiny_model, lanes=8).profile["lanes"] == 8
    assert load_worker(tiny_model, lanes=0).profile["lanes"] in (4, 8, 16, 32, 64)


def test_seeds_of_the_pictures_of_one_request_differ():
    assert len({picture_seed(7, index) for index in range(1000)}) == 1000
    assert picture_seed(7, 3) != picture_seed(8, 3)


def test_a_request_has_the_settings_of_every_stage_under_the_same_names():
    assert set(SampleOptions.model_fields) <= set(ImageRequest.model_fields)


def test_pictures_from_python_are_those_of_the_same_requests(worker):
    pictures = worker.sample("penguin", n=3, seed=7, steps=4, guidance_scale=2.0)
    asked = [request(picture_seed(7, i), prompt="penguin", guidance_scale=2.0) for i in range(3)]
    for picture_, pixels in zip(pictures, worker.paint(asked), strict=True):
        assert np.array_equal(np.asarray(picture_), pixels)
    assert np.array_equal(np.asarray(worker.sample("penguin", seed=7, steps=4, guidance_scale=2.0)[0]), pictures[0])


def test_edits_from_python_are_those_of_the_same_requests(worker):
    original = Image.fromarray(picture(5))
    cases = [
        ("inpaint", {"mask": Image.open(io.BytesIO(mask(BOX)))}, {"mask": mask(BOX)}),
        ("denoise", {"noise_level": 0.3}, {"noise_level": 0.3, "guidance_scale": 1.0}),
        ("denoise", {"guidance_scale": 2.0}, {"guidance_scale": 2.0}),
        ("image_to_image", {"strength": 0.6}, {"strength": 0.6}),
    ]
    for task, options, fields in cases:
        made = worker.edit(task, original, prompt="cat", seed=4, steps=4, **options)
        asked = request(4, task=task, image=to_png(picture(5)), prompt="cat", **fields)
        assert np.array_equal(np.asarray(made), worker.paint([asked])[0])
    made = worker.edit("vary", seed=4, steps=4, parent=2, strength=0.3)
    assert np.array_equal(np.asarray(made), worker.paint([request(4, task="vary", parent=2, strength=0.3)])[0])
    with pytest.raises(RequestError, match="task"):
        worker.edit("paint", original)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"prompt": "dog"}, "prompt"),
        ({"stepz": 4}, "stepz"),
        ({"steps": 0}, "steps"),
        ({"sampler": "magic"}, "sampler"),
        ({"grid": "timesteps"}, "grid"),
        ({"seed": -1}, "seed"),
        ({"guidance_low": 3.0, "guidance_high": 2.0}, "guidance_low"),
    ],
)
def test_what_python_asks_wrongly_is_refused_by_its_name(worker, options, field):
    with pytest.raises(RequestError, match=field):
        worker.sample(**options)


def test_guidance_can_be_limited_to_noise_levels_and_rescaled(worker):
    base = worker.paint([request(prompt="cat", guidance_scale=1.0)])[0]
    full = worker.paint([request(prompt="cat", guidance_scale=4.0)])[0]
    never = worker.paint([request(prompt="cat", guidance_scale=4.0, guidance_low=500.0)])[0]
    some = worker.paint([request(prompt="cat", guidance_scale=4.0, guidance_high=1.0)])[0]
    rescaled = worker.paint([request(prompt="cat", guidance_scale=4.0, guidance_rescale=1.0)])[0]
    assert np.array_equal(never, base)
    assert not np.array_equal(some, full)
    assert not np.array_equal(rescaled, full)


def test_threads_that_a_call_apart_has_begun_end_with_it():
    def compute():
        torch.set_num_threads(2)
        with torch.no_grad():
            torch.ones(1 << 20).add_(1)  # large enough to be shared among threads
        return tasks()

    def tasks():
        return {path.name for path in Path("/proc/self/task").iterdir()}

    threads, before = torch.get_num_threads(), tasks()
    try:
        begun = apart(compute) - before
        assert len(begun) >= 2, "the one that computes, and its helper"
        sessions.until(lambda: len(begun & tasks()) <= len(begun) - 2, "both to end", 20, 0.01)
    finally:
        torch.set_num_threads(threads)


# Takes and frees 32 MB in a thread, over and over; prints how many pages it had to ask for after the first time.
TICKS = """
import resource, runpy, threading
import numpy as np

if {keeps}:
    runpy.run_path({file!r})["keep"]()

def ticks():
    for tick in range(12):
        if tick == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        parts = [np.ones(1 << 20) for _ in range(4)]
        del parts
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=ticks)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_that_a_tick_frees_is_there_for_the_next_one():
    def pages(keeps, **environment):
        command = [sys.executable, "-c", TICKS.format(keeps=keeps, file=memory.__file__)]
        # Of huge pages, which numpy asks for, there are few to count.
        environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0", **environment}
        run = subprocess.run(command, env=environment, capture_output=True, check=True)
        return int(run.stdout)

    assert pages(False) > 10_000, "glibc by itself: otherwise there is nothing to keep"
    assert pages(True) < 500
    assert pages(False, **memory.keeping()["env_vars"]) < 500


def test_threads_are_part_of_the_profile_on_a_cpu_alone(tiny_model, monkeypatch):
    own = load_worker(tiny_model, lanes=8)
    assert own.profile == {
        "device": "cpu", "dtype": "float32", "lanes": 8, "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    monkeypatch.setattr(own, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    assert own.profile == {"device": "H100", "dtype": "float32", "lanes": 8, "torch": torch.__version__}
