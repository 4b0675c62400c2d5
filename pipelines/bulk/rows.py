"""A row of a table as a request: defaults from the flags, values of the right kind, nothing that no model can do."""

import difflib
import functools
import io
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ValidationError

from diffusion_core.config import ModelConfig
from pipelines.cells import resolve, word
from pipelines.config import GenerateConfig, PipelineError
from pipelines.image_sets import FILES, own_names, request_columns
from pipelines.requests import ImageRequest, RequestError, open_request

_ALIASES = {"class": "prompt"}
_WORDS = ("task", "prompt", "negative_prompt", "sampler", "grid", "inpainting")
_SEEDS = 2**62
# Which tasks have a use for a flag that is a default of all rows.
_USES = {"strength": ("image_to_image", "vary"), "noise_level": ("denoise",)}
Row = dict[str, Any]


def settings_of(config: GenerateConfig, said: Row) -> Row:
    """All that is asked for, but seed and files: what a row says, and for the rest the flags."""
    return {**_defaults(config, said.get("task", config.task)), **said}


def _defaults(config: GenerateConfig, task: str) -> Row:
    """What the flags say of a task."""
    defaults = {
        name: getattr(config, name)
        for name in request_columns()
        if name != "seed" and hasattr(config, name) and task in _USES.get(name, (task,))
    }
    if task == "denoise" and "guidance_scale" not in config.model_fields_set:
        defaults["guidance_scale"] = 1.0  # noise is taken away from what is there; no class is to be made plainer
    return defaults


def check_columns(table: str, columns: Iterable[str], carried: Iterable[str]) -> None:
    """Raise PipelineError on a column that means nothing here, with the nearest that does."""
    columns, carried = list(columns), list(carried)
    known = [*request_columns(), *FILES, *_ALIASES, "model"]
    for name in columns:
        if name not in known and name not in carried:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise PipelineError(f"{table}: column {name!r} means nothing here; {hint} To take it along: --carry {name}")
    for name in carried:
        if name in known:
            raise PipelineError(f"{table}: --carry {name}: the output has such a column anyway; leave the flag out")
        if name in own_names():
            raise PipelineError(f"{table}: --carry {name}: the output has one of its own; rename the table's column")
    if {"class", "prompt"} <= set(columns):
        raise PipelineError(f"{table}: columns 'class' and 'prompt' are the same thing; leave one out")


def check_carried(table: str, columns: Iterable[str], carried: Iterable[str]) -> None:
    """Raise PipelineError on a column to carry that is not there."""
    there = list(columns)
    for name in carried:
        if name not in there:
            raise PipelineError(f"{table}: --carry {name}: no such column; there are {', '.join(there)}")


class Checker:
    """Turns rows of one table into what is staged; what is alike but for the seed is tried on the model once."""

    def __init__(self, config: GenerateConfig, table: str, model: ModelConfig, names: tuple[str, ...]) -> None:
        self.config, self.table, self.names = config, table, names
        self._defaults = functools.cache(functools.partial(_defaults, config))
        self._tried: Callable[[str], str] = functools.lru_cache(maxsize=4096)(functools.partial(_tried, model))

    def staged(self, row: Row) -> Row:
        """A row's settings, and its files as `image_uri`, `image_bytes` …. Raises RequestError on what cannot be."""
        cells = {_ALIASES.get(name, name): value for name, value in row.items() if not _is_empty(value)}
        model = cells.pop("model", None)
        if model is not None and model not in self.names:
            raise RequestError("model", f"{model!r}, but this job's is {self.names[0]}; make a job for each model")
        files = {name: self._file(name, cells.pop(name)) for name in FILES if name in cells}
        said = {name: word(value) if name in _WORDS else value for name, value in cells.items()}
        seed = said.pop("seed", None)
        request = _request(
            {**self._defaults(said.get("task", self.config.task)), **said, "seed": 0 if seed is None else seed}
        )
        settings = request.model_dump(exclude={"seed", *FILES})
        parent = settings["parent"]
        alike = {**settings, "parent": 0 if parent is not None and 0 <= parent < _SEEDS else parent}
        refused = self._tried(json.dumps([alike, sorted(files)]))
        if refused:
            raise RequestError(*refused.split(": ", 1))
        placed = {f"{name}_{kind}": value for name, (kind, value) in files.items()}
        return {**settings, "seed": None if seed is None else request.seed, **placed}

    def _file(self, name: str, value: Any) -> tuple[str, str | bytes]:
        """A picture's bytes, or its URI, which a table may give from its own folder on."""
        if isinstance(value, dict):  # as Hugging Face's datasets store a picture
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return "bytes", value
        if not isinstance(value, str):
            raise RequestError(name, f"{type(value).__name__}; need an address, or bytes in a Parquet column")
        if not self.config.addresses:
            raise RequestError(name, "an address; here pictures come as bytes, in a column of a Parquet table")
        try:
            return "uri", resolve(self.table, value)
        except ValueError as error:
            raise RequestError(name, str(error)) from error


def refusal(error: ValidationError) -> RequestError:
    """The first thing that is wrong with a request, by its field."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"])) or "settings"
    return RequestError(field, f"{first.get('input')!r}: {first['msg'].removeprefix('Value error, ')}")


def _request(values: Row) -> ImageRequest:
    try:
        return ImageRequest.model_validate(values)
    except ValidationError as error:
        raise refusal(error) from error


def _tried(model: ModelConfig, alike: str) -> str:
    """Why the model cannot do this, whatever the seed and the pictures are; empty where it can."""
    settings, files = json.loads(alike)
    try:
        open_request(ImageRequest(**settings, seed=0, **dict.fromkeys(files, stand_in(model.unet.resolution))), model)
    except RequestError as error:
        return str(error)
    return ""


@functools.lru_cache(maxsize=4)
def stand_in(resolution: int) -> bytes:
    """A picture in place of one that is read later: grey, one half transparent."""
    pixels = np.full((resolution, resolution, 4), 128, dtype=np.uint8)
    pixels[: resolution // 2, :, 3] = 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _is_empty(value: Any) -> bool:
    """Whether a cell says nothing."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))
