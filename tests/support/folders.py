"""Small models that a user could have published, without training them, and what can be done to their folders."""

import torch
from torch import nn

from diffusion_core.config import ModelConfig, Timesteps, UNetConfig
from diffusion_core.schedules import timestep_sigmas
from pipelines import exchange
from pipelines.config import ExportConfig
from pipelines.model import Publication, publish_model


def discrete(prediction, betas="linear", classes=()):
    """A tiny model that is told its timesteps, as `train --timesteps` makes them."""
    unet = UNetConfig(8, 3, (16, 32), 1, (1,), 32, 8, classes=len(classes), embedding="timestep")
    levels, timesteps = timestep_sigmas(Timesteps(betas)), Timesteps(betas)
    return ModelConfig(unet, prediction, 0.5, float(levels[0]), float(levels[-1]), classes, "linear", timesteps)


def shaken(network, std=0.1):
    """The network with random parameters: norms that are one and zero convolutions would hide a mix-up."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std)
    return network.eval()


def published(folder, config, weights):
    lineage = {"kind": "train", "name": "tiny", "settings": {}, "dataset": "d", "dataset_digest": "0", "parent": None}
    publish_model(str(folder), Publication(config, {0.1: weights}, lineage, {"curve": [], "validation": []}, None))
    return str(folder)


def export(model, to):
    return exchange.run(ExportConfig(model=str(model), to=str(to))).uri


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
