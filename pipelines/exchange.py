"""The export and import stages: a published model as a folder of diffusers, and a UNet2DModel as a published model."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from diffusion_core.config import ModelConfig, Prediction, ScheduleName, Timesteps, UNetConfig
from diffusion_core.names import (
    config_from_diffusers,
    diffusers_config,
    diffusers_scheduler,
    from_diffusers,
    schedule_from_diffusers,
    to_diffusers,
)
from diffusion_core.schedules import timestep_sigmas
from diffusion_core.unet import UNet
from pipelines import __version__, storage
from pipelines.config import ExportConfig, ImportConfig, Outcome, PipelineError, identity, what
from pipelines.model import Model, Publication, load_model, model_digest, publish_model

VERSION = 1
_CONFIG, _WEIGHTS, _PICKLE = "config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
_CLASSES = "class_names.json"
_EXPRESSIBLE = "train with --prediction eps --timesteps linear --schedule linear --sigma uniform_t for one that can"
# What "uniform in t" means for a model of these betas.
_SCHEDULES: dict[str, ScheduleName] = {"linear": "linear", "scaled_linear": "linear", "cosine": "cosine"}


def find(config: ExportConfig | ImportConfig) -> Outcome | None:
    """The exported folder or the imported model, if it is there whole. Raises PipelineError as `run` does."""
    if isinstance(config, ExportConfig):
        return _find_export(config)
    uri = _target(_open(config.source), config)
    return Outcome(uri=uri, found=True) if storage.is_published(uri) else None


def run(config: ExportConfig | ImportConfig) -> Outcome:
    """Write the folder, or publish the model.

    Raises PipelineError, by the setting's name, where the other side has no counterpart, and StorageError where a
    file is missing or damaged.
    """
    return _export(config) if isinstance(config, ExportConfig) else _import(config)


def _find_export(config: ExportConfig) -> Outcome | None:
    """The folder, if this model was exported there, with every file as it was written."""
    if not storage.is_published(config.to):
        return None
    manifest = storage.read_manifest(config.to, "diffusers")
    digest = model_digest(storage.read_manifest(config.model, "model"))
    if manifest["model"]["digest"] != digest:
        raise PipelineError(f"{config.to}: holds {manifest['model']['uri']}, another model; give --to an empty folder")
    for part in manifest["parts"]:
        storage.read_part(config.to, part)
    return Outcome(uri=config.to, found=True)


def _export(config: ExportConfig) -> Outcome:
    model = load_model(config.model)
    try:
        files = _files(model)
    except ValueError as error:
        raise PipelineError(f"{config.model}: {error}; {_EXPRESSIBLE}") from error
    parts = []
    for name, data in files.items():
        # A folder that somebody else fills must not lose a file to us; after a stop the same bytes are met again.
        if storage.create_bytes(storage.join(config.to, name), data) == "other":
            raise PipelineError(f"{config.to}: has another {name}; give --to an empty folder")
        parts.append({"name": name, "bytes": len(data), "sha256": storage.digest(data)})
    origin = {"uri": model.uri, "digest": model.digest}
    storage.publish(config.to, {"kind": "diffusers", "schema": 1, "code": __version__, "model": origin, "parts": parts})
    return Outcome(uri=config.to, found=False)


def _files(model: Model) -> dict[str, bytes]:
    """The folder's files by name. Raises ValueError where diffusers cannot express the model."""
    scheduler = {"_class_name": "DDPMScheduler", **diffusers_scheduler(model.config)}
    unet = {"_class_name": "UNet2DModel", **diffusers_config(model.config.unet)}
    tensors = to_diffusers(model.config.unet, model.denoiser.network.state_dict())
    weights = {name: value.contiguous() for name, value in tensors.items()}
    files = {
        f"unet/{_CONFIG}": storage.to_json(unet),
        f"unet/{_WEIGHTS}": safetensors.torch.save(weights, {"format": "pt"}),
        "scheduler/scheduler_config.json": storage.to_json(scheduler),
        "README.md": _card(model).encode(),
    }
    if model.config.class_names:
        # diffusers has no pipeline that hands classes to a UNet2DModel.
        return {**files, _CLASSES: storage.to_json(list(model.config.class_names))}
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    return {**files, "model_index.json": storage.to_json({"_class_name": "DDPMPipeline", **parts})}


def _card(model: Model) -> str:
    """What the folder is and how diffusers loads it."""
    names = model.config.class_names
    load = (
        'UNet2DModel.from_pretrained(FOLDER, subfolder="unet")\nDDIMScheduler.from_pretrained(FOLDER, '
        'subfolder="scheduler")' if names else "DDIMPipeline.from_pretrained(FOLDER)"
    )  # fmt: skip
    classes = f"Classes, by label: {', '.join(names)}; label {len(names)} is none of them.\n\n" if names else ""
    size = model.config.unet.resolution
    return (
        f"# A diffusion U-Net for {size}x{size} pictures\n\n{classes}```python\n{load}\n```\n\n"
        f"Exported from the model of digest {model.digest}. Pictures are in [-1, 1]; clip_sample is off.\n"
    )


def _import(config: ImportConfig) -> Outcome:
    folder = _open(config.source)
    model, adds_null = _model_config(folder, config)
    weights = _weights(folder, model.unet, adds_null)
    lineage = {
        "kind": "import", "name": config.name, "settings": what(config), "source": folder.uri,
        "digest": folder.digest, "step": 0, "parent": None,
    }  # fmt: skip
    uri = _target(folder, config)
    publish_model(uri, Publication(model, {0.0: weights}, lineage, {"curve": [], "validation": []}, None))
    names, size = ", ".join(model.class_names) or "none", model.unet.resolution
    print(f"import: predicts {model.prediction}, {size}x{size} pixels, classes: {names}", flush=True)
    if adds_null:
        print(
            "import: every row of its class embedding is a class; their mean stands in for no class, so guidance is a "
            "guess: give --guidance-scale 1",
            flush=True,
        )
    return Outcome(uri=uri, found=False)


@dataclass(frozen=True)
class _Folder:
    """A diffusers folder: what its files say, its weights as bytes, and a digest over all that was read."""

    uri: str
    unet: dict[str, Any]
    scheduler: dict[str, Any] | None
    class_names: list[str]
    weights_uri: str
    weights: bytes
    digest: str


def _open(uri: str) -> _Folder:
    """The folder at `uri`, its files checked where a manifest of ours lies beside them. Raises PipelineError."""
    manifest = storage.read_manifest(uri, "diffusers") if storage.is_published(uri) else {"parts": []}
    parts = {part["name"]: part for part in manifest["parts"]}
    below = "unet/" if storage.exists(storage.join(uri, f"unet/{_CONFIG}")) else ""
    optional = ("scheduler/scheduler_config.json", "scheduler_config.json", _CLASSES)
    names = [f"{below}{_CONFIG}", *(name for name in optional if storage.exists(storage.join(uri, name)))]
    files = {name: _read(uri, parts, name) for name in names}
    said = {name: _parsed(storage.join(uri, name), data) for name, data in files.items()}
    _check_kind(storage.join(uri, names[0]), said[names[0]])
    weights_uri = _weights_uri(uri, below)
    files[below + _WEIGHTS] = _read(uri, parts, below + _WEIGHTS)
    sums = [f"{name} {storage.digest(data)}" for name, data in sorted(files.items())]
    schedulers = [said[name] for name in optional[:2] if name in said]
    return _Folder(
        uri, said[names[0]], schedulers[0] if schedulers else None, said.get(_CLASSES, []), weights_uri,
        files[below + _WEIGHTS], storage.digest("\n".join(sums).encode()),
    )  # fmt: skip


def _read(uri: str, parts: dict[str, Any], name: str) -> bytes:
    """A file of the folder, checked where the manifest lists it."""
    return storage.read_part(uri, parts[name]) if name in parts else storage.read_bytes(storage.join(uri, name))


def _parsed(uri: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise PipelineError(f"{uri}: not valid JSON ({error}); save the model again") from error


def _check_kind(uri: str, unet: Any) -> None:
    """Refuse other networks than UNet2DModel."""
    kind = unet.get("_class_name") if isinstance(unet, dict) else None
    if kind != "UNet2DModel":
        raise PipelineError(f"{uri}: _class_name: {kind!r}; only 'UNet2DModel' can be read")


def _weights_uri(uri: str, below: str) -> str:
    """Where the weights lie. Raises PipelineError where they are not in one file of safetensors."""
    weights, pickle = (storage.join(uri, below + name) for name in (_WEIGHTS, _PICKLE))
    if storage.exists(weights):
        return weights
    if storage.exists(pickle):
        raise PipelineError(
            f"{pickle}: a pickle, which can run any code when it is opened; where you trust it, load it with diffusers "
            "and save it again (save_pretrained writes safetensors)"
        )
    raise PipelineError(f"{weights}: not found; save the model in one file of safetensors, without a variant")


def _target(folder: _Folder, config: ImportConfig) -> str:
    """Where the folder's model lies in the store."""
    run = identity("import", VERSION, what(config), folder.digest)
    return storage.join(storage.normalise(config.store), "models", config.name, run, "published", "step-0000000")


def _model_config(folder: _Folder, config: ImportConfig) -> tuple[ModelConfig, bool]:
    """The model's configuration, and whether its class embedding lacks the null class."""
    names, adds_null = _classes(folder, config)
    prediction, timesteps = _schedule(folder, config)
    rows = {"num_class_embeds": len(names) + 1} if names else {}
    unet = _converted(folder, config_from_diffusers, {**folder.unet, **rows}, config.resolution)
    if unet.channels != 3:
        raise PipelineError(f"{folder.uri}: in_channels: {unet.channels}; only 3 can be read, as pictures have here")
    if config.resolution not in (None, unet.resolution):
        raise PipelineError(
            f"{folder.uri}: sample_size: {unet.resolution}, but --resolution {config.resolution}; leave it out"
        )
    low, high = timestep_sigmas(timesteps)[[0, -1]].tolist()
    made = ModelConfig(
        unet, prediction, sigma_min=low, sigma_max=high, class_names=tuple(names),
        schedule=_SCHEDULES[timesteps.betas], timesteps=timesteps,
    )  # fmt: skip
    return made, adds_null


def _classes(folder: _Folder, config: ImportConfig) -> tuple[list[str], bool]:
    """Names of the classes, and whether every row of the embedding is one of them."""
    rows = folder.unet.get("num_class_embeds") or 0
    names = config.class_names or folder.class_names or [str(label) for label in range(rows)]
    if len(names) not in ({rows, rows - 1} if rows else {0}):
        raise PipelineError(
            f"{folder.uri}: num_class_embeds: {rows}, but {len(names)} class names; give one for each, or one fewer "
            "where the last row means no class"
        )
    if len(set(names)) != len(names):
        raise PipelineError(f"{folder.uri}: class names: {', '.join(names)}; need different ones")
    return names, bool(rows) and len(names) == rows


def _schedule(folder: _Folder, config: ImportConfig) -> tuple[Prediction, Timesteps]:
    """What the network predicts and its timesteps: by its scheduler's config, or by the flags where there is none."""
    if folder.scheduler is None:
        return _schedule_by_flags(folder, config)
    prediction, timesteps = _converted(folder, schedule_from_diffusers, folder.scheduler)
    told = {
        "prediction": prediction, "betas": timesteps.betas, "timesteps": timesteps.count,
        "beta_first": timesteps.first, "beta_last": timesteps.last,
    }  # fmt: skip
    for name, value in told.items():
        asked = getattr(config, name)
        if asked not in (None, value):
            raise PipelineError(
                f"{folder.uri}: its scheduler says {name} {value}, but --{name.replace('_', '-')} {asked} was given; "
                "leave it out"
            )
    return prediction, timesteps


def _schedule_by_flags(folder: _Folder, config: ImportConfig) -> tuple[Prediction, Timesteps]:
    if config.prediction is None or config.betas is None:
        raise PipelineError(f"{folder.uri}: no scheduler_config.json; give --prediction and --betas")
    own = Timesteps()
    first, last = config.beta_first or own.first, config.beta_last or own.last
    timesteps = _converted(folder, Timesteps, config.betas, config.timesteps or own.count, first, last)
    return config.prediction, timesteps


def _weights(folder: _Folder, unet: UNetConfig, adds_null: bool) -> dict[str, Tensor]:
    """The tensors under our names, float32. Raises PipelineError on one too many, too few, or of another shape."""
    try:
        theirs = safetensors.torch.load(folder.weights)
    except safetensors.SafetensorError as error:
        raise PipelineError(f"{folder.weights_uri}: no safetensors ({error}); save the model again") from error
    ours = _converted(folder, from_diffusers, unet, theirs)
    found = {name: value.float().contiguous() for name, value in ours.items()}
    if adds_null and "classes.weight" in found:
        rows = found["classes.weight"]
        found["classes.weight"] = torch.cat((rows, rows.mean(dim=0, keepdim=True)))
    _check_shapes(folder, unet, found)
    return found


def _check_shapes(folder: _Folder, unet: UNetConfig, found: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        needed = {name: value.shape for name, value in UNet(unet).state_dict().items()}
    for name in sorted(needed):
        if name not in found or found[name].shape != needed[name]:
            has = list(found[name].shape) if name in found else "missing"
            (told,) = to_diffusers(unet, {name: torch.empty(0)})
            raise PipelineError(
                f"{folder.weights_uri}: {told}: {has}; its config needs {list(needed[name])}; save both again"
            )


def _converted(folder: _Folder, convert: Callable[..., Any], *given: Any) -> Any:
    """What `convert` makes of these; what has no counterpart is told with the folder's name."""
    try:
        return convert(*given)
    except (ValueError, TypeError) as error:
        raise PipelineError(f"{folder.uri}: {error}") from error
