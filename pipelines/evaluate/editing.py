"""How well held-out pictures are repainted and cleaned of noise, the latter beside classical methods."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.config import EvaluateConfig
from pipelines.evaluate.orders import Edits
from pipelines.features import distances
from pipelines.images import Pixels
from pipelines.report import grid

# Strengths that are tried for the classical methods; the one that serves the pictures best counts.
_MEANS = (0.4, 0.6, 0.8)
_VARIATIONS = (0.5, 1.0, 1.5, 2.0)


def editing_figures(config: EvaluateConfig, edits: Edits, pictures: dict[str, Pixels]) -> dict[str, Any]:
    """Errors of the edits; where a picture is known it must come back byte for byte."""
    return {
        "inpainting": {
            name: _inpainting(config, edits.rows.pixels, mask, pictures[f"inpainted-{name}"])
            for name, mask in edits.masks.items()
        },
        "denoising": {
            f"{level:g}": {
                method: distances.mean(psnr(cleaned, edits.rows.pixels), config.bootstrap, _rng(config))
                for method, cleaned in {
                    "noisy": noisy,
                    "model": pictures[f"denoised-{level:g}"],
                    **classical(edits.rows.pixels, noisy, level),
                }.items()
            }
            for level, noisy in edits.noisy.items()
        },
    }


def editing_grids(edits: Edits, pictures: dict[str, Pixels]) -> dict[str, Pixels]:
    """Grids of masked, repainted and original pictures by mask; of noisy, cleaned and original ones by level."""
    original = edits.rows.pixels
    grids = {}
    for name, mask in edits.masks.items():
        masked = np.where(mask[:, :, None], np.uint8(128), original)
        grids[f"inpainted-{name}"] = _columns(masked, pictures[f"inpainted-{name}"], original)
    for level, noisy in edits.noisy.items():
        grids[f"denoised-{level:g}"] = _columns(noisy, pictures[f"denoised-{level:g}"], original)
    return grids


def classical(pictures: Pixels, noisy: Pixels, level: float) -> dict[str, Pixels]:
    """scikit-image's denoisers, told sigma (for values in [-1, 1]), each at the strength that serves it best."""
    from skimage import restoration

    sigma = level / 2  # of values in [0, 1]
    images = noisy / 255.0

    def best(candidates: list[list[NDArray[np.float64]]]) -> Pixels:
        cleaned = [np.rint(np.clip(np.stack(each), 0, 1) * 255).astype(np.uint8) for each in candidates]
        return max(cleaned, key=lambda each: float(psnr(each, pictures).mean()))

    means = [
        [
            restoration.denoise_nl_means(
                image, patch_size=3, patch_distance=7, h=factor * sigma, sigma=sigma, fast_mode=True, channel_axis=2
            )
            for image in images
        ]
        for factor in _MEANS
    ]
    variations = [
        [restoration.denoise_tv_chambolle(image, weight=factor * sigma, channel_axis=2) for image in images]
        for factor in _VARIATIONS
    ]
    return {"non-local means": best(means), "total variation": best(variations)}


def psnr(a: Pixels, b: Pixels) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB, [N], of pictures [N, H, W, 3]."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean(axis=(1, 2, 3))
    return np.asarray(10 * np.log10(255.0**2 / np.maximum(error, 1e-9)))


def _inpainting(config: EvaluateConfig, original: Pixels, mask: NDArray[np.bool_], repainted: Pixels) -> dict[str, Any]:
    """Mean absolute error of what was repainted, for values in [-1, 1]; bytes changed where the picture was known."""
    error = np.abs(repainted.astype(np.int64) - original)
    unknown = error[:, mask].reshape(len(original), -1).mean(axis=1) / 127.5
    return {
        "mean_error": distances.mean(unknown, config.bootstrap, _rng(config)),
        "known_bytes_changed": int((error[:, ~mask] != 0).sum()),
    }


def _rng(config: EvaluateConfig) -> np.random.Generator:
    return np.random.default_rng(config.seed)


def _columns(*rows: Pixels) -> Pixels:
    """Pictures of several kinds under one another, one column for each original."""
    return grid(np.concatenate(rows), len(rows[0]))
