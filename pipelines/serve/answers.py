"""What the HTTP API gives: files of pictures, in JSON or as server-sent events, as OpenAI's images API has them."""

import base64
import json
import time
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from pipelines.images import to_file
from pipelines.requests import ImageRequest, Opened, metadata
from pipelines.serve.catalogue import Version
from pipelines.serve.schemas import MEDIA_TYPES, Body
from pipelines.worker.loop import End, Preview


class Picture(BaseModel):
    """One picture of an answer."""

    b64_json: str | None = Field(None, description="the file in base64, with response_format b64_json")
    url: str | None = Field(None, description="the file as a data: URL, with response_format url")
    seed: int = Field(description="seed of this picture alone; as parent it can be varied")


class ImagesAnswer(BaseModel):
    """Pictures, and what made them."""

    created: int = Field(description="seconds since 1970")
    model: str = Field(description="name of the model")
    version: str = Field(description="digest of the version of the model that made them")
    seed: int = Field(description="seed of the request; with the same version it makes the same pictures again")
    size: str = Field(description="width x height of the pictures")
    output_format: str
    data: list[Picture]
    usage: dict[str, Any] = Field(description="denoiser_calls; tokens, of which there are none, for OpenAI's sake")


class ErrorDetail(BaseModel):
    """What is wrong with a request, or with the service."""

    message: str
    type: str
    param: str | None = Field(description="the field that is wrong")
    code: str | None


class ErrorAnswer(BaseModel):
    """An error as OpenAI's API words it."""

    error: ErrorDetail


@dataclass(frozen=True)
class Making:
    """A request under way: what was asked, by which version, and the seed of each picture."""

    body: Body
    version: Version
    asked: ImageRequest
    opened: Opened
    seed: int
    seeds: list[int]

    @property
    def size(self) -> str:
        """Width x height of the pictures."""
        side, frame = self.version.config.unet.resolution, self.opened.frame
        return f"{side}x{side}" if frame is None else f"{frame.width}x{frame.height}"

    def answer(self, ends: list[End]) -> dict[str, Any]:
        """The whole answer as JSON."""
        body = self.body
        told = {"created": int(time.time()), "model": self.version.name, "version": self.version.digest}
        how = {"seed": self.seed, "size": self.size, "output_format": body.output_format}
        return {**told, **how, "data": [self._picture(end) for end in ends], "usage": _usage(ends)}

    def preview_event(self, preview: Preview, number: int) -> bytes:
        """The event of a preview, the `number`-th of its picture."""
        file = to_file(self.opened.answer(preview.pixels), self.body.output_format, {}, self.body.output_compression)
        told = {"partial_image_index": number, "step": preview.done, "steps": preview.calls}
        return self._event("partial_image", preview.place, _base64(file), told)

    def end_event(self, end: End) -> bytes:
        """The event of a finished picture."""
        return self._event("completed", end.place, self._picture(end)["b64_json"], {"usage": _usage([end])})

    def _event(self, kind: str, index: int, file: str, more: dict[str, Any]) -> bytes:
        body, action = self.body, "image_generation" if self.body.task in ("generate", "vary") else "image_edit"
        told = {
            "type": f"{action}.{kind}", "created_at": int(time.time()), "index": index, "b64_json": file,
            "size": self.size, "background": "opaque", "quality": body.quality, "output_format": body.output_format,
            "model": self.version.name, "version": self.version.digest, "seed": self.seeds[index], **more,
        }  # fmt: skip
        return event(told["type"], told)

    def _picture(self, end: End) -> dict[str, Any]:
        """One picture as its file, with what made it inside."""
        assert end.pixels is not None
        own, kind = self.seeds[end.place], self.body.output_format
        texts = metadata(self.asked.model_copy(update={"seed": own}), self.version.digest)
        file = _base64(to_file(self.opened.answer(end.pixels), kind, texts, self.body.output_compression))
        if self.body.response_format == "url" and not self.body.stream:
            return {"url": f"data:{MEDIA_TYPES[kind]};base64,{file}", "seed": own}
        return {"b64_json": file, "seed": own}


def event(kind: str, data: dict[str, Any]) -> bytes:
    """A server-sent event (HTML Living Standard, 9.2)."""
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def describe(version: Version) -> dict[str, Any]:
    """A model, and what it can do."""
    unet, config = version.config.unet, version.config
    size = f"{unet.resolution}x{unet.resolution}"
    return {
        "id": version.name, "object": "model", "created": 0, "owned_by": "you", "digest": version.digest,
        "size": size, "classes": list(config.class_names), "prediction": config.prediction,
        "tasks": ["generate", "vary", "inpaint", "denoise", "image_to_image"],
        "negative_prompt": bool(config.class_names),
        "noise_levels": [config.sigma_min, config.sigma_max],
    }  # fmt: skip


def _usage(ends: list[End]) -> dict[str, Any]:
    """Denoiser calls, where others count tokens."""
    tokens = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    details = {"image_tokens": 0, "text_tokens": 0}
    return {**tokens, "input_tokens_details": details, "denoiser_calls": sum(end.calls for end in ends)}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
