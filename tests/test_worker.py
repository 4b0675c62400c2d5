import io

import numpy as np
import pytest
from PIL import Image

from pipelines.config import SampleOptions
from pipelines.images import to_png
from pipelines.requests import ImageRequest, RequestError
from pipelines.worker import load_worker, picture_seed


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
        ({"task": "inpaint", "image": to_png(picture()), "mask": mask(np.ones((4, 4)))}, "mask: 4x4 pixels; .* 8x8"),
        ({"task": "denoise", "image": to_png(picture())}, "noise_level: None; need more than 0.002"),
        ({"task": "denoise", "image": to_png(picture()), "noise_level": 99.0}, "noise_level: 99"),
        ({"task": "denoise", "image": to_png(np.zeros((9, 8, 3), np.uint8)), "noise_level": 0.1}, "image: 8x9 pixels"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name_before_any_work(worker, fields, told):
    with pytest.raises(RequestError, match=told):
        worker.paint([request(prompt="cat"), request(**fields)])


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
