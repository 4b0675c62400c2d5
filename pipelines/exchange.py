"""The export and import stages: a published model as a folder of diffusers, and a UNet2DModel as a published model."""

import json
from collections.abc import Callable
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
    uri = _Source(config).target(config)
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
    source = _Source(config)
    uri = source.target(config)
    model, adds_null = source.model(config)
    weights = source.weights(model.unet, adds_null)
    lineage = {
        "kind": "import", "name": config.name, "settings": what(config), "source": config.source,
        "digest": source.digest, "step": 0, "parent": None,
    }  # fmt: skip
    publish_model(uri, Publication(model, {0.0: weights}, lineage, {"curve": [], "validation": []}, None))
    timesteps, size = model.timesteps, model.unet.resolution
    assert timesteps is not None
    print(
        f"import: {model.prediction} of {timesteps.count} {timesteps.betas} timesteps, {size}x{size} pixels, classes: "
        f"{', '.join(model.class_names) or 'none'}",
        flush=True,
    )
    if adds_null:
        print(
            "import: every row of its class embedding is a class; their mean stands in for no class, so guidance is a "
            "guess: give --guidance-scale 1",
            flush=True,
        )
    return Outcome(uri=uri, found=False)


class _Source:
    """A diffusers folder: its files read once, and checked where a manifest lies beside them."""

    def __init__(self, config: ImportConfig) -> None:
        self.uri = config.source
        self.parts: dict[str, Any] = {}
        if storage.is_published(self.uri):
            manifest = storage.read_manifest(self.uri, "diffusers")
            self.parts = {part["name"]: part for part in manifest["parts"]}
        self.files: dict[str, bytes] = {}
        folder = "unet/" if storage.exists(storage.join(self.uri, f"unet/{_CONFIG}")) else ""
        self.unet = self._json(f"{folder}{_CONFIG}")
        self.weights_name = f"{folder}{_WEIGHTS}"
        self._check_kind(folder)
        self._read(self.weights_name)
        places = ("scheduler/scheduler_config.json", "scheduler_config.json")
        found = [name for name in places if storage.exists(storage.join(self.uri, name))]
        self.scheduler = self._json(found[0]) if found else None
        named = storage.exists(storage.join(self.uri, _CLASSES))
        self.class_names: list[str] = self._json(_CLASSES) if named else []

    @property
    def digest(self) -> str:
        """What identifies it: a digest over the files that were read."""
        sums = [f"{name} {storage.digest(data)}" for name, data in sorted(self.files.items())]
        return storage.digest("\n".join(sums).encode())

    def target(self, config: ImportConfig) -> str:
        """Where its model lies in the store."""
        run = identity("import", VERSION, what(config), self.digest)
        return storage.join(storage.normalise(config.store), "models", config.name, run, "published", "step-0000000")

    def model(self, config: ImportConfig) -> tuple[ModelConfig, bool]:
        """Its configuration, and whether its class embedding lacks the null class.

        Raises PipelineError, by the key, on what has no counterpart.
        """
        names, adds_null = self._classes(config)
        prediction, timesteps = self._schedule(config)
        rows = {"num_class_embeds": len(names) + 1} if names else {}
        unet = self._converted(config_from_diffusers, {**self.unet, **rows}, config.resolution)
        if unet.channels != 3:
            raise PipelineError(f"{self.uri}: in_channels: {unet.channels}; pictures here have 3: only 3 can be read")
        if config.resolution not in (None, unet.resolution):
            raise PipelineError(
                f"{self.uri}: sample_size: {unet.resolution}, but --resolution {config.resolution}; leave it out"
            )
        low, high = timestep_sigmas(timesteps)[[0, -1]].tolist()
        made = ModelConfig(
            unet, prediction, sigma_min=low, sigma_max=high, class_names=tuple(names),
            schedule=_SCHEDULES[timesteps.betas], timesteps=timesteps,
        )  # fmt: skip
        return made, adds_null

    def weights(self, unet: UNetConfig, adds_null: bool) -> dict[str, Tensor]:
        """Its tensors under our names, float32. Raises PipelineError on one too many, too few, or of another shape."""
        uri = storage.join(self.uri, self.weights_name)
        try:
            theirs = safetensors.torch.load(self.files[self.weights_name])
        except safetensors.SafetensorError as error:
            raise PipelineError(f"{uri}: no safetensors ({error}); save the model again") from error
        ours = self._converted(from_diffusers, unet, theirs)
        found = {name: value.float().contiguous() for name, value in ours.items()}
        if adds_null:
            rows = found["classes.weight"]
            found["classes.weight"] = torch.cat((rows, rows.mean(dim=0, keepdim=True)))
        with torch.device("meta"):
            needed = {name: value.shape for name, value in UNet(unet).state_dict().items()}
        for name in sorted(needed):
            if name not in found or found[name].shape != needed[name]:
                has = list(found[name].shape) if name in found else "missing"
                (told,) = to_diffusers(unet, {name: torch.empty(0)})
                raise PipelineError(f"{uri}: {told}: {has}; its config needs {list(needed[name])}; save both again")
        return found

    def _classes(self, config: ImportConfig) -> tuple[list[str], bool]:
        """Names of its classes, and whether every row of its embedding is one of them."""
        rows = self.unet.get("num_class_embeds") or 0
        names = config.class_names or self.class_names or [str(label) for label in range(rows)]
        if len(names) not in ({rows, rows - 1} if rows else {0}):
            raise PipelineError(
                f"{self.uri}: num_class_embeds: {rows}, but {len(names)} class names; give one for each, or one fewer "
                "where the last row means no class"
            )
        if len(set(names)) != len(names):
            raise PipelineError(f"{self.uri}: class names: {', '.join(names)}; need different ones")
        return names, bool(rows) and len(names) == rows

    def _schedule(self, config: ImportConfig) -> tuple[Prediction, Timesteps]:
        """What it predicts and its timesteps: by its scheduler's config, or by the flags where it has none."""
        if self.scheduler is None:
            return self._schedule_by_flags(config)
        prediction, timesteps = self._converted(schedule_from_diffusers, self.scheduler)
        told = {
            "prediction": prediction, "betas": timesteps.betas, "timesteps": timesteps.count,
            "beta_first": timesteps.first, "beta_last": timesteps.last,
        }  # fmt: skip
        for name, value in told.items():
            asked = getattr(config, name)
            if asked not in (None, value):
                raise PipelineError(
                    f"{self.uri}: its scheduler says {name} {value}, but --{name.replace('_', '-')} {asked} was given; "
                    "leave it out"
                )
        return prediction, timesteps

    def _schedule_by_flags(self, config: ImportConfig) -> tuple[Prediction, Timesteps]:
        if config.prediction is None or config.betas is None:
            raise PipelineError(f"{self.uri}: no scheduler_config.json; give --prediction and --betas")
        own = Timesteps()
        first, last = config.beta_first or own.first, config.beta_last or own.last
        return config.prediction, self._converted(Timesteps, config.betas, config.timesteps or own.count, first, last)

    def _converted(self, convert: Callable[..., Any], *given: Any, **more: Any) -> Any:
        """What `convert` makes of these; what has no counterpart is told with the folder's name."""
        try:
            return convert(*given, **more)
        except (ValueError, TypeError) as error:
            raise PipelineError(f"{self.uri}: {error}") from error

    def _check_kind(self, folder: str) -> None:
        """Refuse other networks than UNet2DModel, and weights in other files than one of safetensors."""
        config, weights, pickle = (storage.join(self.uri, folder + name) for name in (_CONFIG, _WEIGHTS, _PICKLE))
        kind = self.unet.get("_class_name") if isinstance(self.unet, dict) else None
        if kind != "UNet2DModel":
            raise PipelineError(f"{config}: _class_name: {kind!r}; only 'UNet2DModel' can be read")
        if storage.exists(weights):
            return
        if storage.exists(pickle):
            raise PipelineError(
                f"{pickle}: a pickle, which can run any code when it is opened; where you trust it, load it with "
                "diffusers and save it again (save_pretrained writes safetensors)"
            )
        raise PipelineError(f"{weights}: not found; save the model in one file of safetensors, without a variant")

    def _json(self, name: str) -> Any:
        try:
            return json.loads(self._read(name))
        except ValueError as error:
            raise PipelineError(f"{storage.join(self.uri, name)}: not valid JSON ({error})") from error

    def _read(self, name: str) -> bytes:
        """A file of the folder, kept; checked where the folder's manifest lists it."""
        part = self.parts.get(name)
        uri = storage.join(self.uri, name)
        self.files[name] = storage.read_part(self.uri, part) if part else storage.read_bytes(uri)
        return self.files[name]
