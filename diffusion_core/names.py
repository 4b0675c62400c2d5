"""The U-Net's tensors, its shape and a model's schedule under the names of diffusers, both ways.

The tensors are the same. diffusers counts blocks by level, keeps attention beside the residual blocks, and down- and
upsampling with their level; here each half is one list.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor

from diffusion_core.config import BetaName, ModelConfig, Prediction, Timesteps, UNetConfig

_FIXED = {
    "embed.inner": "time_embedding.linear_1",
    "embed.outer": "time_embedding.linear_2",
    "enter": "conv_in",
    "leave_norm": "conv_norm_out",
    "leave": "conv_out",
}
_BLOCK = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "condition": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
# What attention's tensors were called before diffusers 0.15.
_FORMER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_PREDICTIONS: dict[Prediction, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_BETAS: dict[BetaName, str] = {
    "linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2",
}  # fmt: skip
NameT = TypeVar("NameT", bound=str)


def to_diffusers(config: UNetConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A U-Net's tensors under diffusers' names. Raises ValueError on a name that such a network does not have."""
    return _renamed(tensors, dict(_modules(config)), "UNet")


def from_diffusers(config: UNetConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """UNet2DModel's tensors under our names, also those of early versions.

    Raises ValueError on a name that such a network does not have.
    """
    modules = {theirs: ours for ours, theirs in _modules(config)}
    former = {_former(theirs): ours for theirs, ours in modules.items()}
    return _renamed(tensors, {**former, **modules}, "UNet2DModel")


def diffusers_config(config: UNetConfig) -> dict[str, Any]:
    """The arguments of the UNet2DModel that answers the same. Raises ValueError where there is none, and says why."""
    if config.embedding != "timestep":
        raise ValueError(f"embedding: {config.embedding}; UNet2DModel embeds timesteps alone")
    if not config.middle_norm and not config.scale_shift:
        raise ValueError("middle_norm: off; UNet2DModel leaves that norm out with scale_shift alone")
    attends = [level in config.attention for level in range(len(config.widths))]
    return {
        "sample_size": config.resolution,
        "in_channels": config.channels,
        "out_channels": config.channels,
        "block_out_channels": config.widths,
        "layers_per_block": config.blocks,
        "down_block_types": tuple("AttnDownBlock2D" if each else "DownBlock2D" for each in attends),
        "up_block_types": tuple("AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)),
        "add_attention": config.middle_attention,
        "attention_head_dim": config.head_channels or None,
        "norm_num_groups": config.groups,
        "attn_norm_num_groups": config.groups if config.middle_norm else None,
        "norm_eps": config.norm_eps,
        "dropout": config.dropout,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "flip_sin_to_cos": not config.sine_first,
        "freq_shift": config.frequency_shift,
        "downsample_padding": 1 if config.downsample_padding == "both" else 0,
        "num_class_embeds": config.classes + 1 if config.classes else None,
    }


# What UNet2DModel may be told that has one meaning here, or none: setting -> values that are read.
_ONLY: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "center_input_sample": (False,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1, 1.0),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
    "num_train_timesteps": (None,),
}


def config_from_diffusers(values: dict[str, Any], resolution: int | None = None) -> UNetConfig:
    """The shape of the U-Net with the tensors of UNet2DModel(**values); keys that begin with "_" are left out.

    `resolution` stands in for a missing sample_size. Its last class is taken for the null class. Raises ValueError
    on a setting that our network has no counterpart for, and names it.
    """
    given = {**_DEFAULTS, **{key: value for key, value in values.items() if not key.startswith("_")}}
    for key, known in _ONLY.items():
        if given.pop(key, known[0]) not in known:
            raise ValueError(f"{key}: {values[key]!r} has no counterpart; only {known[0]!r} can be read")
    if given["in_channels"] != given.pop("out_channels"):
        raise ValueError(f"out_channels: differs from in_channels={given['in_channels']}; need the same")
    size = given.pop("sample_size") or resolution
    if not isinstance(size, int):
        raise ValueError(f"sample_size: {size!r}; need one number, the height and width in pixels")
    downs, ups = list(given.pop("down_block_types")), list(given.pop("up_block_types"))
    attention = tuple(level for level, kind in enumerate(downs) if kind == "AttnDownBlock2D")
    expected = [kind.replace("Down", "Up") for kind in reversed(downs)]
    if ups != expected or not set(downs) <= {"DownBlock2D", "AttnDownBlock2D"}:
        raise ValueError(f"down_block_types, up_block_types: {downs}, {ups}; need (Attn)DownBlock2D and their mirror")
    return _config(given, size, attention, _middle_norm(given))


_DEFAULTS: dict[str, Any] = {
    **diffusers_config(
        UNetConfig(widths=(224, 448, 672, 896), attention=(1, 2, 3), head_channels=8, groups=32, embedding="timestep")
    ),
    "sample_size": None,
    "layers_per_block": 2,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
}


def diffusers_scheduler(model: ModelConfig) -> dict[str, Any]:
    """The arguments of the schedulers that sample as `model` does. Raises ValueError where there are none, and why."""
    if model.prediction not in _PREDICTIONS:
        raise ValueError(f"prediction: {model.prediction}; diffusers' schedulers know {', '.join(_PREDICTIONS)} alone")
    if model.timesteps is None:
        raise ValueError("timesteps: none; diffusers' schedulers tell a network its timestep, not ln(sigma)/4")
    return {
        "num_train_timesteps": model.timesteps.count,
        "beta_start": model.timesteps.first,
        "beta_end": model.timesteps.last,
        "beta_schedule": _BETAS[model.timesteps.betas],
        "prediction_type": _PREDICTIONS[model.prediction],
        "clip_sample": False,
    }


def schedule_from_diffusers(values: dict[str, Any]) -> tuple[Prediction, Timesteps]:
    """What the network predicts and its timesteps, by the config of a scheduler; how it would sample is left out.

    Raises ValueError on a setting that has no counterpart, and names it.
    """
    betas = _counterpart("beta_schedule", values.get("beta_schedule"), _BETAS)
    prediction = _counterpart("prediction_type", values.get("prediction_type", "epsilon"), _PREDICTIONS)
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if values.get(key):
            raise ValueError(f"{key}: {values[key]!r} has no counterpart; need a schedule by its name, down to sigma")
    own = Timesteps()
    keys = {"count": "num_train_timesteps", "first": "beta_start", "last": "beta_end"}
    return prediction, Timesteps(betas, **{name: values.get(key, getattr(own, name)) for name, key in keys.items()})


def _counterpart(key: str, value: Any, names: dict[NameT, str]) -> NameT:
    """Our name for one of theirs."""
    for ours, theirs in names.items():
        if value == theirs:
            return ours
    raise ValueError(f"{key}: {value!r} has no counterpart; can read {', '.join(names.values())}")


def _middle_norm(given: dict[str, Any]) -> bool:
    """Whether UNet2DModel norms before the bottleneck's attention: told to, or by default where it only shifts."""
    groups = given.pop("attn_norm_num_groups")
    if groups not in (None, given["norm_num_groups"]):
        raise ValueError(f"attn_norm_num_groups: {groups}; only norm_num_groups={given['norm_num_groups']} can be read")
    return groups is not None or given["resnet_time_scale_shift"] == "default"


def _config(given: dict[str, Any], size: int, attention: tuple[int, ...], middle_norm: bool) -> UNetConfig:
    """Our config from the settings that have a counterpart; refuses any other."""
    made = UNetConfig(
        resolution=size,
        channels=given.pop("in_channels"),
        widths=tuple(given.pop("block_out_channels")),
        blocks=given.pop("layers_per_block"),
        attention=attention,
        head_channels=given.pop("attention_head_dim") or 0,
        groups=given.pop("norm_num_groups"),
        dropout=given.pop("dropout"),
        classes=(given.pop("num_class_embeds") or 1) - 1,
        scale_shift=given.pop("resnet_time_scale_shift") == "scale_shift",
        middle_attention=given.pop("add_attention"),
        middle_norm=middle_norm,
        embedding="timestep",
        sine_first=not given.pop("flip_sin_to_cos"),
        frequency_shift=float(given.pop("freq_shift")),
        downsample_padding="both" if given.pop("downsample_padding") else "end",
        norm_eps=given.pop("norm_eps"),
    )
    if given:
        raise ValueError(f"{', '.join(sorted(given))}: unknown to UNet2DModel; remove it")
    return made


def _modules(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Pairs of our module and theirs, for all modules that hold tensors."""
    yield from _FIXED.items()
    if config.classes:
        yield "classes", "class_embedding"
    last, at = len(config.widths) - 1, 0
    for level in range(last + 1):
        for layer in range(config.blocks):
            yield from _block(f"down.{at}", f"down_blocks.{level}", layer)
            at += 1
        if level < last:
            yield f"down.{at}.conv", f"down_blocks.{level}.downsamplers.0.conv"
            at += 1
    at = 0
    for level in range(last + 1):
        for layer in range(config.blocks + 1):
            yield from _block(f"up.{at}", f"up_blocks.{level}", layer)
            at += 1
        if level < last:
            yield f"up.{at}.conv", f"up_blocks.{level}.upsamplers.0.conv"
            at += 1
    for layer in range(2):
        yield from _block(f"middle.{layer}", "mid_block", layer)


def _block(ours: str, level: str, layer: int) -> Iterator[tuple[str, str]]:
    """Pairs of one residual block and the attention behind it."""
    for inner, outer in _BLOCK.items():
        yield f"{ours}.{inner}", f"{level}.resnets.{layer}.{outer}"
    for inner, outer in _ATTENTION.items():
        yield f"{ours}.attention.{inner}", f"{level}.attentions.{layer}.{outer}"


def _former(theirs: str) -> str:
    """The name that a module had in early versions of diffusers."""
    for name, before in _FORMER.items():
        if theirs.endswith(f".{name}"):
            return f"{theirs.removesuffix(name)}{before}"
    return theirs


def _renamed(tensors: dict[str, Tensor], modules: dict[str, str], kind: str) -> dict[str, Tensor]:
    """Tensors under new names of their modules."""
    renamed = {}
    for name, value in tensors.items():
        module, _, parameter = name.rpartition(".")
        if module not in modules:
            raise ValueError(f"{name}: no such tensor in a {kind} of this shape; check the config that came with it")
        renamed[f"{modules[module]}.{parameter}"] = value
    return renamed
