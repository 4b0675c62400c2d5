"""How well a trained model repaints, denoises and varies the pictures of its own data set.

usage: python benchmarks/editing.py [--store runs/demo] [--name cartoons] [--count 48] [--pictures FOLDER]

Takes the newest model NAME of a store and the data set beside it, and held-out pictures of that. Prints
1. inpainting by several masks and methods: errors on the repainted pixels, the share that a classifier still names as
   the picture's class, known bytes changed, and the cost in forward passes of the network;
2. denoising by level: PSNR of the model (level known and estimated) and of scikit-image's classical denoisers, which
   get the true level and the strength that serves them best on these very pictures;
3. image to image and variations by strength. `--pictures` saves what is shown in the docs.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage import restoration
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion_core.config import Inpainting, SamplerConfig
from diffusion_core.engine import Engine
from diffusion_core.noise import normal
from diffusion_core.tasks import Request, prepare
from pipelines.dataset import open_dataset
from pipelines.evaluate.orders import masks
from pipelines.features.learned import predict, train_classifier
from pipelines.images import to_bytes, to_floats
from pipelines.model import load_model, newest_model
from pipelines.storage import StorageError

SDE = SamplerConfig("dpmpp_2m_sde", 18, eta=1.0)
METHODS: dict[str, tuple[SamplerConfig, Inpainting]] = {
    "replacement": (SamplerConfig(), Inpainting("replacement")),
    "replacement, fresh noise": (SDE, Inpainting("replacement")),
    "RePaint 5/3": (SamplerConfig(), Inpainting("replacement", jump=5, times=3)),
    "RePaint 10/5, ddpm 40": (SamplerConfig("ddpm", 40, "karras"), Inpainting("replacement", jump=10, times=5)),
    "posterior, 1 solve": (SamplerConfig(), Inpainting(solves=1)),
    "posterior (default)": (SamplerConfig(), Inpainting()),
    "posterior, fresh noise": (SDE, Inpainting()),
    "posterior, walked twice": (SamplerConfig(), Inpainting(times=2)),
}
SIGMAS = (0.1, 0.2, 0.4, 0.7, 1.0)
STRENGTHS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Trial:
    """A model's engine, held-out pictures [B, C, H, W] with labels, and the judge of classes."""

    engine: Engine
    pictures: Tensor
    labels: list[int]
    judge: Any
    product_cost: float

    def make(self, requests: list[Request]) -> tuple[Tensor, float]:
        """Pictures [B, C, H, W], and seconds."""
        began = time.perf_counter()
        made = torch.stack(self.engine.run(requests))
        return made, time.perf_counter() - began

    def agreement(self, x: Tensor, labels: list[int]) -> float:
        """Share that the judge names as `labels`."""
        return float((predict(self.judge, to_bytes(x.numpy())) == np.array(labels)).mean())


def main() -> None:
    """Measure and print."""
    options = _options()
    torch.set_num_threads(os.cpu_count() or 1)
    trial = open_trial(options)
    print(f"{len(trial.pictures)} held-out pictures; a vector-Jacobian product costs {trial.product_cost:.2f} forwards")
    painted = inpainting(trial, mask_tensors(trial.pictures.shape[-1]))
    without = replace(trial, labels=[trial.engine.model.unet.classes] * len(trial.labels))
    print("without class and guidance:")
    inpainting(trial, mask_tensors(trial.pictures.shape[-1]), unconditional=without.labels)
    denoised = {clipped: denoising(trial, clipped) for clipped in (False, True)}
    edited = edits(trial)
    if options.pictures:
        save(Path(options.pictures), trial, painted, denoised[False], edited)


def open_trial(options: argparse.Namespace) -> Trial:
    """The newest model of the store with its data set's held-out pictures."""
    try:
        model = load_model(newest_model(options.store, options.name))
    except StorageError as error:
        sys.exit(f"error: {error}")
    folders = sorted(Path(options.store, "datasets", options.name).glob("*/manifest.json"), key=os.path.getmtime)
    data = open_dataset(str(folders[-1].parent.resolve()))
    rows = data.read("heldout", options.count)
    judge = train_classifier(data.read("train"), len(data.class_names), 500, 0)
    model.denoiser.network.requires_grad_(False).to(memory_format=torch.channels_last)
    pictures = torch.from_numpy(to_floats(rows.pixels))
    return Trial(Engine(model.denoiser), pictures, rows.labels.tolist(), judge, product_cost(model.denoiser, pictures))


def product_cost(denoiser: Any, pictures: Tensor) -> float:
    """Time of a vector-Jacobian product over that of a forward pass, the best of several."""
    x = pictures[:8].contiguous(memory_format=torch.channels_last)
    sigma, forward, backward = torch.ones(len(x)), [], []
    for _ in range(8):
        at = x.detach().requires_grad_()
        began = time.perf_counter()
        with torch.no_grad():
            denoiser(at, sigma, None)
        forward.append(time.perf_counter() - began)
        out = denoiser(at, sigma, None)
        began = time.perf_counter()
        torch.autograd.grad(out, at, x)
        backward.append(time.perf_counter() - began)
    return min(backward) / min(forward)


def mask_tensors(side: int) -> dict[str, Tensor]:
    """The masks of evaluations, [1, side, side], 1 where to repaint."""
    return {name: torch.from_numpy(mask)[None].float() for name, mask in masks(side).items()}


def inpainting(
    trial: Trial, holes: dict[str, Tensor], unconditional: list[int] | None = None
) -> dict[str, dict[str, Tensor]]:
    """Print the table of masks and methods; returns what each made."""
    print(
        f"{'mask':8} {'method':26} {'mean error':>10} {'rms':>6} {'class':>6} {'bytes changed':>13} "
        f"{'cost':>5} {'s':>6}"
    )
    made: dict[str, dict[str, Tensor]] = {}
    for hole, mask in holes.items():
        for method, (sampler, how) in METHODS.items():
            requests = [
                Request(seed, "inpaint", sampler, label, 1.0 if unconditional else 2.0,
                        picture=picture, mask=mask, inpainting=how)
                for seed, (picture, label) in enumerate(zip(trial.pictures, unconditional or trial.labels, strict=True))
            ]  # fmt: skip
            x, seconds = trial.make(requests)
            made.setdefault(hole, {})[method] = x
            print(
                f"{hole:8} {method:26} {figures(trial, x, mask)} {cost(trial, requests[0]):5.0f} {seconds:6.1f}",
                flush=True,
            )
    return made


def figures(trial: Trial, x: Tensor, mask: Tensor) -> str:
    """Errors on the repainted pixels, class agreement, and bytes that should not have changed."""
    repainted = (mask == 1).expand_as(x)
    error = (x.clamp(-1, 1) - trial.pictures)[repainted]
    changed = to_bytes(x.numpy()) != to_bytes(trial.pictures.numpy())
    kept = (mask == 0).expand_as(x).permute(0, 2, 3, 1).numpy()
    rms, share = float(error.square().mean()) ** 0.5, trial.agreement(x, trial.labels)
    return f"{float(error.abs().mean()):10.3f} {rms:6.3f} {share:6.2f} {int(changed[kept].sum()):13}"


def cost(trial: Trial, request: Request) -> float:
    """Forward passes of the network, a vector-Jacobian product counted as measured."""
    job = prepare(request, trial.engine.model)
    rows = len(job.plan) if job.plan is not None else 0
    products = job.request.solves + 1 if job.request.solves else 0
    return rows * ((2 if request.guidance_scale != 1 else 1) + products * trial.product_cost)


def denoising(trial: Trial, clipped: bool) -> dict[float, dict[str, Tensor]]:
    """Print PSNR by level and method; returns what each made."""
    print(f"denoising, {'noise clipped and rounded to bytes' if clipped else 'noise as it is'}: PSNR in dB")
    made: dict[float, dict[str, Tensor]] = {}
    for sigma in SIGMAS:
        seeds = torch.arange(len(trial.pictures))
        noisy = trial.pictures + sigma * normal(seeds, "degrade", 0, trial.pictures.shape[1:])
        if clipped:
            noisy = ((noisy.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        made[sigma] = {"noisy": noisy, **classical(trial.pictures, noisy, sigma)}
        for name, level in (("ours, level known", sigma), ("ours, level estimated", None)):
            requests = [
                Request(0, "denoise", SamplerConfig(steps=1), label, picture=picture, noise_level=level)
                for picture, label in zip(noisy, [None] * len(noisy), strict=True)
            ]
            made[sigma][name] = trial.make(requests)[0]
        if sigma == SIGMAS[0]:
            print("sigma  " + "  ".join(f"{name:>22}" for name in made[sigma]) + "   gain over the best classical")
        scores = {name: psnr(x, trial.pictures) for name, x in made[sigma].items()}
        best = max(score for name, score in scores.items() if not name.startswith(("ours", "noisy")))
        row = "  ".join(f"{score:22.2f}" for score in scores.values())
        print(f"{sigma:5}  {row}   {scores['ours, level known'] - best:+.2f}", flush=True)
    return made


def classical(pictures: Tensor, noisy: Tensor, sigma: float) -> dict[str, Tensor]:
    """scikit-image's denoisers on [0, 1], told the level, each with the strength that serves it best here."""
    level = sigma / 2
    images = [((picture + 1) / 2).permute(1, 2, 0).numpy().astype(np.float64) for picture in noisy]

    def back(results: list[Any]) -> Tensor:
        return torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2).float() * 2 - 1

    def best(candidates: list[list[Any]]) -> Tensor:
        return max((back(results) for results in candidates), key=lambda x: psnr(x, pictures))

    means = [
        [
            restoration.denoise_nl_means(
                image, patch_size=3, patch_distance=7, h=factor * level, sigma=level, fast_mode=False, channel_axis=2
            )
            for image in images
        ]
        for factor in (0.4, 0.6, 0.8)
    ]
    variations = [
        [restoration.denoise_tv_chambolle(image, weight=factor * level, channel_axis=2) for image in images]
        for factor in (0.5, 1.0, 1.5, 2.0)
    ]
    return {"non-local means": best(means), "total variation": best(variations)}


def psnr(x: Tensor, pictures: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, values clipped to [-1, 1]."""
    error = (x.clamp(-1, 1) - pictures).square().flatten(1).mean(dim=1)
    return float((10 * torch.log10(4 / error.clamp(min=1e-12))).mean())


def edits(trial: Trial) -> dict[str, Tensor]:
    """Print how far edits and variations go by strength; returns those of the first pictures."""
    count, classes = min(24, len(trial.pictures)), trial.engine.model.unet.classes
    source, sampler = trial.pictures[:count], SamplerConfig()
    targets = [(label + 1) % classes for label in trial.labels[:count]]
    parents = trial.make([Request(seed, "generate", sampler, seed % classes, 2.0) for seed in range(count)])[0].clamp(
        -1, 1
    )
    shown: dict[str, Tensor] = {"source": source, "parent": parents}
    print("strength   image to image: rms to the source, named as the target   variation: rms to the parent")
    for strength in STRENGTHS:
        moved = trial.make([
            Request(seed, "image_to_image", sampler, target, 2.0, picture=picture, strength=strength)
            for seed, (picture, target) in enumerate(zip(source, targets, strict=True))
        ])[0]  # fmt: skip
        varied = trial.make([
            Request(1000 + seed, "vary", sampler, seed % classes, 2.0, parent=seed, strength=strength)
            for seed in range(count)
        ])[0]  # fmt: skip
        far, off = (float((a.clamp(-1, 1) - b).square().mean()) ** 0.5 for a, b in ((moved, source), (varied, parents)))
        print(f"{strength:8}   {far:32.3f} {trial.agreement(moved, targets):21.2f}   {off:29.3f}", flush=True)
        shown[f"edit {strength}"], shown[f"vary {strength}"] = moved, varied
    return shown


def save(
    folder: Path,
    trial: Trial,
    painted: dict[str, dict[str, Tensor]],
    denoised: dict[float, dict[str, Tensor]],
    edited: dict[str, Tensor],
) -> None:
    """The pictures of the docs."""
    folder.mkdir(parents=True, exist_ok=True)
    holes = mask_tensors(trial.pictures.shape[-1])
    rows = {"known": "", "replacement": "replacement", "RePaint 5/3": "RePaint 5/3",
            "posterior": "posterior (default)", "original": ""}  # fmt: skip
    columns: dict[str, list[Tensor]] = {name: [] for name in rows}
    for place, (hole, mask) in enumerate(holes.items()):
        for at in range(3 * place, 3 * place + 3):
            original = trial.pictures[at]
            columns["known"].append(torch.where(mask == 1, torch.tensor(0.0), original))
            columns["original"].append(original)
            for name in ("replacement", "RePaint 5/3", "posterior"):
                columns[name].append(painted[hole][rows[name]][at])
    _figure(columns, folder / "repainted.png", ["box", "half", "strokes", "every second line"])
    names = ["noisy", "non-local means", "total variation", "ours, level known"]
    columns = {name: [denoised[sigma][name][at] for sigma in (0.2, 0.4, 1.0) for at in range(4)] for name in names}
    columns["original"] = [trial.pictures[at] for _ in range(3) for at in range(4)]
    _figure(columns, folder / "denoisers.png", ["noise 0.2", "noise 0.4", "noise 1.0"])
    columns = {
        f"edit, strength {s:g}": list(edited[f"edit {s}"][:6]) + list(edited[f"vary {s}"][:6]) for s in STRENGTHS
    }
    _figure(
        {key.replace("edit, ", ""): value for key, value in columns.items()},
        folder / "edits.png",
        ["image to image, as the next class", "variations of a seed"],
    )


def _figure(rows: dict[str, list[Tensor]], path: Path, titles: list[str]) -> None:
    """Rows of pictures with their names at the left, and a title over each equal part of the columns."""
    import matplotlib.pyplot as plt

    width = len(next(iter(rows.values())))
    figure, axes = plt.subplots(len(rows), width, figsize=(0.85 * width + 1.2, 0.88 * len(rows)), squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(((picture.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_axis_off()
        line[0].text(-0.12, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    for number, title in enumerate(titles):
        first = axes[0][number * width // len(titles)]
        first.text(0.0, 1.08, title, transform=first.transAxes, ha="left", va="bottom", fontsize=9)
    figure.subplots_adjust(left=0.11, right=0.995, top=0.94, bottom=0.01, wspace=0.06, hspace=0.06)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="runs/demo", help="store with the model and its data set")
    parser.add_argument("--name", default="cartoons", help="name of both")
    parser.add_argument("--count", type=int, default=48, help="held-out pictures")
    parser.add_argument("--pictures", help="folder to save pictures in")
    return parser.parse_args()


if __name__ == "__main__":
    main()
