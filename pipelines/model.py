"""Published models: a folder of safetensors, config.json, a card and a manifest. Whoever has the folder can load it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from diffusion_core.config import ModelConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.unet import UNet
from pipelines import __version__, storage
from pipelines.config import PipelineError


@dataclass(frozen=True)
class Model:
    """A loaded model and where it came from."""

    uri: str
    digest: str
    denoiser: Denoiser

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.denoiser.config


@dataclass(frozen=True)
class Publication:
    """What a model folder is made of: averages of the weights by width, the first of which samples; lineage; curves.

    `lineage` says of what kind they are ("train", "import") and where they come from; `samples` is a grid of pictures
    as a PNG, if some were drawn.
    """

    config: ModelConfig
    averages: dict[float, dict[str, Tensor]]
    lineage: dict[str, Any]
    curves: dict[str, list[list[float]]]
    samples: bytes | None


def publish_model(folder: str, publication: Publication) -> None:
    """Write a model folder. Raises PipelineError where another was published there meanwhile."""
    first, *others = publication.averages
    lineage, curves = publication.lineage, publication.curves
    parts = [
        _part(folder, "model.safetensors", _saved(publication.averages[first])),
        *(_part(folder, f"ema-{width:g}.safetensors", _saved(publication.averages[width])) for width in others),
        _part(folder, "config.json", storage.to_json(publication.config.to_dict())),
        _part(folder, "curve.json", storage.to_json(curves)),
        *([_part(folder, "samples.png", publication.samples)] if publication.samples else []),
        _part(folder, "README.md", _card(publication).encode()),
    ]
    manifest = {"kind": "model", "schema": 1, "code": __version__, "parts": parts, "lineage": lineage}
    if storage.publish(folder, manifest) == "other":
        raise PipelineError(f"{folder}: another run published other weights under this name; use another name or store")


def load_model(uri: str) -> Model:
    """The model folder at `uri`, on the CPU, ready to sample. Raises StorageError where it is missing or damaged."""
    uri = storage.normalise(uri)
    manifest = storage.read_manifest(uri, "model")
    config = _config(uri, manifest)
    network = UNet(config.unet)
    try:
        network.load_state_dict(safetensors.torch.load(read_file(uri, manifest, "model.safetensors")))
    except (ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise PipelineError(f"{uri}: not a model of this version ({error}); publish it again") from error
    return Model(uri, model_digest(manifest), Denoiser(network.eval(), config))


def load_config(uri: str) -> ModelConfig:
    """The configuration of the model folder at `uri`. Raises StorageError where it is missing or damaged."""
    return _config(storage.normalise(uri), storage.read_manifest(storage.normalise(uri), "model"))


def read_file(uri: str, manifest: dict[str, Any], name: str) -> bytes:
    """A file of a model folder, as its manifest promised it. Raises StorageError where it is missing or damaged."""
    found = [part for part in manifest["parts"] if part["name"] == name]
    if not found:
        raise PipelineError(f"{uri}: {storage.MANIFEST} lists no {name}; publish it again")
    return storage.read_part(uri, found[0])


def _config(uri: str, manifest: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.from_dict(json.loads(read_file(uri, manifest, "config.json")))
    except (KeyError, TypeError, ValueError) as error:
        raise PipelineError(f"{uri}: not a model of this version ({error}); publish it again") from error


def model_digest(manifest: dict[str, Any]) -> str:
    """What identifies a model: a digest over its weights and configuration."""
    sums = [part["sha256"] for part in manifest["parts"] if part["name"] in ("model.safetensors", "config.json")]
    return storage.digest(" ".join(sorted(sums)).encode())


def newest_model(store: str, name: str) -> str:
    """URI of the model of this name that was published last. Raises StorageError where there is none."""
    models = published_models(store, name)
    if not models:
        raise no_model(store, name)
    return models[-1]


def published_models(store: str, name: str) -> list[str]:
    """URIs of all models of this name, the one that was published last at the end."""
    base = _base(store, name)
    folders = [
        storage.join(base, run, "published", step)
        for run in storage.list_folders(base)
        for step in storage.list_folders(storage.join(base, run, "published"))
    ]
    manifests = [storage.join(folder, storage.MANIFEST) for folder in folders if storage.is_published(folder)]
    return [uri.rsplit("/", 1)[0] for uri in sorted(manifests, key=lambda uri: (storage.modified(uri), uri))]


def no_model(store: str, name: str) -> storage.StorageError:
    """What to raise where no model of this name can be taken."""
    return storage.StorageError(
        f"{_base(store, name)}: no published model here; run the train stage first, or give --model"
    )


def _base(store: str, name: str) -> str:
    return storage.join(storage.normalise(store), "models", name)


def _part(folder: str, name: str, data: bytes) -> dict[str, Any]:
    """A file of the folder, under its plain name, for the manifest."""
    storage.write_bytes(storage.join(folder, name), data)
    return {"name": name, "bytes": len(data), "sha256": storage.digest(data)}


def _saved(weights: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in weights.items()})


def _card(publication: Publication) -> str:
    """The model card in Markdown."""
    config, lineage = publication.config, publication.lineage
    rows = "\n".join(f"| {key} | {value} |" for key, value in sorted(lineage["settings"].items()))
    told = [
        f"Classes: {', '.join(config.class_names) or 'none (unconditional)'}",
        *_ORIGINS[lineage["kind"]](publication),
    ]
    points = "\n".join(f"- {line}" for line in told)
    shown = "![samples](samples.png)\n\n" if publication.samples else ""
    size = config.unet.resolution
    return (
        f"# {lineage['name']}\n\nA diffusion U-Net for {size}x{size} pictures, "
        f"prediction {config.prediction}, sigma_data {config.sigma_data:.4f}.\n\n{shown}{points}\n\n"
        f"| setting | value |\n|---|---|\n{rows}\n\n"
        "`config.json` and a `.safetensors` file are all that `diffusion_core` needs to load it; `curve.json`\n"
        "holds the losses, `manifest.json` the checksums.\n"
    )


def _trained(publication: Publication) -> list[str]:
    """What a card says of a model that was trained here."""
    lineage = publication.lineage
    curve, validation = publication.curves["curve"], publication.curves["validation"]
    told = [f"{curve[-1][1]:.4f} in training after {int(curve[-1][0])} steps"] if curve else []
    told += [f"{validation[-1][1]:.4f} on held-out pictures"] if validation else []
    widths = ", ".join(f"{width:g}" for width in publication.averages)
    return [
        f"Dataset: {lineage['dataset']} (digest {lineage['dataset_digest']})",
        *([f"Parent: the model of digest {lineage['parent']}"] if lineage["parent"] else []),
        f"Loss: {', '.join(told) or 'not recorded'}",
        f"Averages of the weights, by relative width: {widths}; the first is model.safetensors",
    ]


_ORIGINS: dict[str, Callable[[Publication], list[str]]] = {
    "train": _trained,
    "import": lambda made: [f"Imported from: {made.lineage['source']} (digest {made.lineage['digest']})"],
}
