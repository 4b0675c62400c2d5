"""A model folder from the state of a run: averages, samples, curves, card."""

import json

import torch
from torch import Tensor

from diffusion_core.config import ModelConfig, SamplerConfig
from diffusion_core.denoiser import Denoiser, guidance, guided
from diffusion_core.noise import derive_seeds
from diffusion_core.samplers import make_plan, model_grid, sample, start_noise
from diffusion_core.unet import UNet
from pipelines import storage
from pipelines.checkpoint import whole
from pipelines.images import Pixels, to_bytes, to_png
from pipelines.model import Publication, model_digest, publish_model, read_file
from pipelines.report import Showing, grid, loss_curve
from pipelines.train.plan import made_by, parent_digest, published
from pipelines.train.session import Session

_COLUMNS = 8
_SEED = 7
_GUIDANCE = 2.0
_LOSSES = {"training": "curve", "held-out": "validation"}


def publish(session: Session) -> str:
    """The model folder of the state's step, written by rank 0 from what all ranks hold; its URI.

    What is there already stays: the same step of the same run has the same weights.
    """
    config, dataset, state, record = session.config, session.dataset, session.state, session.record
    folder = published(session.uri, state.step)
    averages = {width: whole(average) for width, average in zip(config.ema, state.ema, strict=True)}
    if session.leads and not storage.is_published(folder):
        lineage = {
            "kind": "train", "name": config.name, "settings": made_by(config), "dataset": dataset.uri,
            "dataset_digest": dataset.digest, "step": state.step, "parent": parent_digest(config),
        }  # fmt: skip
        curves = {"curve": record.curve, "validation": record.validation}
        pictures = to_png(draw(session, averages[config.ema[0]]))
        publish_model(folder, Publication(state.denoiser.config, averages, lineage, curves, pictures))
    return folder


def show(uri: str) -> Showing:
    """What of a model is worth a look: how it was trained, its samples and its curve."""
    manifest = storage.read_manifest(uri, "model")
    curves = json.loads(read_file(uri, manifest, "curve.json"))
    figures = {"steps": f"{manifest['lineage'].get('step', 0):,}", "digest": model_digest(manifest)[:16]}
    figures |= {f"{kind} loss": f"{curves[name][-1][1]:.4f}" for kind, name in _LOSSES.items() if curves.get(name)}
    pictures = {"loss": loss_curve(**curves, kind="png")}
    if any(part["name"] == "samples.png" for part in manifest["parts"]):
        pictures = {"samples": read_file(uri, manifest, "samples.png"), **pictures}
    return Showing(figures, pictures)


def draw(session: Session, weights: dict[str, Tensor]) -> Pixels:
    """The sample grid of the state's step, which a validation and a publication of that step share."""
    step = session.state.step
    if step not in session.drawn:
        session.drawn = {step: samples(session.state.denoiser.config, weights, session.ranks.device)}
    return session.drawn[step]


@torch.no_grad()
def samples(model: ModelConfig, weights: dict[str, Tensor], device: torch.device) -> Pixels:
    """A grid of pictures from fixed seeds, one column a class: uint8 [H, W, 3]."""
    network = UNet(model.unet)
    network.load_state_dict(weights)
    network = network.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    columns = min(_COLUMNS, model.unet.classes) or _COLUMNS
    rows = 2 if model.unet.classes else 1
    seeds = derive_seeds(_SEED, torch.arange(columns * rows, device=device))
    label = torch.arange(columns, device=device).repeat(rows) if model.unet.classes else None
    scale = guidance(torch.full((columns * rows,), _GUIDANCE, device=device))
    denoiser = Denoiser(network, model)
    sampler = SamplerConfig()
    plan = make_plan(sampler, model_grid(sampler, model))
    shape = (model.unet.channels, model.unet.resolution, model.unet.resolution)
    start = start_noise(plan, seeds, shape, model=model)
    drawn = sample(lambda x, sigma: guided(denoiser, x, sigma, label, scale), plan, start, seeds)
    return grid(to_bytes(drawn.cpu().numpy()), columns)
