"""A run that begins with a published model: what it takes over, and where the weights go in the child's network."""

import dataclasses

import torch
from torch import Tensor

from diffusion_core.config import PRESETS, ModelConfig, UNetConfig
from pipelines.config import PipelineError, TrainConfig
from pipelines.dataset import Dataset
from pipelines.model import load_config

# Settings that are the parent's to say.
DECIDES = ("preset", "prediction", "schedule", "timesteps")
_OF_THE_DATA = ("resolution", "classes", "embedding")


def child_config(parent: str, dataset: Dataset) -> ModelConfig:
    """The model that fine-tuning the parent at a URI on this dataset makes: the parent's, but resolution and classes.

    Raises PipelineError where no such network exists, and where the parent is missing or damaged.
    """
    model = load_config(parent)
    try:
        unet = dataclasses.replace(model.unet, resolution=dataset.resolution, classes=len(dataset.class_names))
    except ValueError as error:
        raise PipelineError(f"parent {parent} on {dataset.uri}: {error}") from error
    return dataclasses.replace(model, unet=unet, class_names=dataset.class_names)


def check_parent(config: TrainConfig) -> None:
    """Raise PipelineError, naming both, where a setting that was given contradicts what the parent is."""
    if not config.parent:
        return
    theirs = load_config(config.parent)
    betas = theirs.timesteps.betas if theirs.timesteps else None
    known = {"prediction": theirs.prediction, "schedule": theirs.schedule, "timesteps": betas}
    for name in (name for name in DECIDES if name in config.model_fields_set):
        given = getattr(config, name)
        found = _difference(PRESETS[given], theirs.unet) if name == "preset" else f"{name} is {known[name]}"
        if found if name == "preset" else given != known[name]:
            raise PipelineError(
                f"parent {config.parent}: its {found}, but --{name} {given} was given; leave --{name} out: it is the "
                "parent's to say, or train without a parent"
            )


def inherited(weights: dict[str, Tensor], parent: ModelConfig, child: ModelConfig) -> dict[str, Tensor]:
    """The parent's tensors for the child's network; the embedding of classes is made for the child's classes.

    Classes that the parent knows by name keep their rows, new ones begin as its null class. What an unconditional
    parent draws, every class of its child draws at first; an unconditional child draws what the null class drew.
    """
    made = dict(weights)
    rows = made.pop("classes.weight", None)
    bias = made["embed.outer.bias"]
    if rows is None:
        rows = torch.zeros(1, len(bias), dtype=bias.dtype)
    if not child.class_names:
        made["embed.outer.bias"] = bias + rows[-1]
        return made
    place = {name: index for index, name in enumerate(parent.class_names)}
    made["classes.weight"] = rows[[*(place.get(name, len(rows) - 1) for name in child.class_names), len(rows) - 1]]
    return made


def _difference(preset: UNetConfig, unet: UNetConfig) -> str:
    """The first thing in which a network is not that of a preset, other than what the data decides; or nothing."""
    fields = [each.name for each in dataclasses.fields(UNetConfig) if each.name not in _OF_THE_DATA]
    differs = [name for name in fields if getattr(preset, name) != getattr(unet, name)]
    return f"{differs[0]} is {getattr(unet, differs[0])}" if differs else ""
