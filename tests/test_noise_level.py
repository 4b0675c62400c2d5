import io
import tarfile

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image

from diffusion_core.noise_level import estimate_sigma

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(channels, height, width):
    ramp = torch.linspace(-0.8, 0.8, width).expand(height, width) * torch.linspace(0.2, 1.0, height)[:, None]
    return torch.stack([ramp * (1 - 0.3 * channel) for channel in range(channels)]).double()


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 8, 64), (1, 64, 64), (4, 40, 24), (2, 33, 47)], ids=str)
@pytest.mark.parametrize("sigma", [0.05, 0.7])
def test_the_level_of_noise_on_a_smooth_picture_is_found_within_its_sampling_error(shape, sigma):
    count = 40
    pictures = gradient(*shape) + sigma * noise((count, *shape))
    found = estimate_sigma(pictures) / sigma
    used = max(shape[0] - 1, 1) * (shape[1] - 2) * (shape[2] - 2)
    # a median of absolute values has about 1.17/sqrt(n) of spread; neighbours share pixels, which doubles it
    assert float(found.mean()) == pytest.approx(1.0, abs=5 * 2.4 / (used * count) ** 0.5 + 1.5 / used)
    assert float((found - 1).abs().max()) < 5 * 2.4 / used**0.5


def photographs(count, side):
    folder = SHARED / "data/clothing"
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        pytest.skip(f"no photographs: {folder} is not there")
    pictures = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = [member for member in tar if member.name.endswith(".jpg")][: count // len(shards)]
            for member in members:
                image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
                edge = min(image.size)
                left, top = (image.width - edge) // 2, (image.height - edge) // 2
                image = image.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.LANCZOS)
                pictures.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 127.5 - 1)
    return torch.stack(pictures)


def test_on_photographs_the_median_error_is_within_five_percent():
    pictures = photographs(64, 64)
    for sigma in (0.05, 0.1, 0.4, 1.0):
        found = estimate_sigma(pictures + sigma * noise(pictures.shape, seed=1))
        assert float((found / sigma - 1).abs().median()) < 0.05


def test_it_scales_with_the_picture_and_ignores_its_brightness():
    picture = gradient(3, 32, 32)[None] + 0.2 * noise((1, 3, 32, 32))
    found = estimate_sigma(picture)
    assert torch.allclose(estimate_sigma(3 * picture), 3 * found, rtol=1e-12)
    assert torch.allclose(estimate_sigma(picture + 0.25), found, rtol=1e-12)


def test_a_picture_has_the_same_level_in_any_batch():
    pictures = gradient(3, 16, 16) + 0.3 * noise((7, 3, 16, 16))
    together = estimate_sigma(pictures)
    for place in range(7):
        assert torch.equal(estimate_sigma(pictures[place : place + 1])[0], together[place])


def test_a_clean_picture_has_no_noise():
    assert estimate_sigma(torch.full((1, 3, 16, 16), 0.3)).tolist() == [0.0]
    assert float(estimate_sigma(gradient(3, 16, 16)[None])) < 1e-6


@pytest.mark.parametrize(
    ("pictures", "told"),
    [
        (torch.zeros(3, 16, 16), r"pictures: torch.float32 \[3, 16, 16\]; need a floating type, \[B, C, H, W\]"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "pictures: torch.uint8"),
        (torch.zeros(1, 0, 16, 16), "need a floating type"),
        (torch.zeros(1, 3, 7, 16), "need H and W of at least 8"),
        (torch.full((1, 3, 8, 8), torch.nan), "pictures: 192 of 192 values are NaN"),
    ],
)
def test_what_is_no_picture_is_refused(pictures, told):
    with pytest.raises(ValueError, match=told):
        estimate_sigma(pictures)
