"""What turns pictures into features: the dataset's own extractor, Inception from the user's weights, or any file."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines import storage
from pipelines.config import PipelineError, identity
from pipelines.dataset import Dataset
from pipelines.features.inception import Inception
from pipelines.features.learned import Classifier, Trunk, train_classifier, train_contrastive
from pipelines.images import Pixels, to_floats

VERSION = 1
_BATCH = 128
_WEIGHTS = "extractor.safetensors"
_PICTURES = 20_000  # of the dataset, from which its own extractor learns
_KINDS = "own, inception:WEIGHTS, FILE.safetensors of an own one, FILE.pt2 (torch.export), FILE.pt (TorchScript)"


# What the readers of such files raise on others.
_UNREADABLE = (RuntimeError, ValueError, KeyError, OSError, pickle.UnpicklingError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Extractor:
    """A network from pictures [B, 3, H, W] in [-1, 1] to features [B, d]; `title` says what it is, to people."""

    title: str
    kind: str
    digest: str
    network: Callable[[Tensor], Tensor]

    @property
    def lineage(self) -> dict[str, str]:
        """What evaluations record of it: figures are comparable where it is the same."""
        return {"title": self.title, "kind": self.kind, "digest": self.digest}

    @torch.inference_mode()
    def embed(self, pixels: Pixels) -> NDArray[np.float64]:
        """Features [N, d] of pictures [N, H, W, 3]."""
        x = torch.from_numpy(to_floats(pixels))
        parts = [self.network(part) for part in torch.split(x, _BATCH)]
        return torch.cat(parts).double().numpy()


@dataclass(frozen=True)
class Judge:
    """The dataset's own extractor, and its classifier where there are classes."""

    extractor: Extractor
    classifier: Classifier | None


def digest_of(features: str) -> str:
    """What identifies the extractor that `features` names: its file's digest; nothing for the dataset's own."""
    return "" if features == "own" else storage.digest(storage.read_bytes(features.removeprefix("inception:")))


def open_extractor(features: str, own: Extractor, trust: bool) -> Extractor:
    """The extractor that `features` names. Raises PipelineError where the file is not of a kind that is known."""
    if features == "own":
        return own
    uri = features.removeprefix("inception:")
    data = storage.read_bytes(uri)
    checksum = storage.digest(data)
    try:
        if uri != features:
            return Extractor("Inception-v3", "inception", checksum, _inception(data, uri))
        if uri.endswith(".safetensors"):
            return _saved(data, uri, checksum)
        if uri.endswith(".pt2"):
            return Extractor(f"{uri.rsplit('/', 1)[1]} (torch.export)", "export", checksum, _exported(data))
        if uri.endswith(".pt"):
            return Extractor(f"{uri.rsplit('/', 1)[1]} (TorchScript)", "script", checksum, _script(data, uri, trust))
    except (*_UNREADABLE, safetensors.SafetensorError) as error:
        raise PipelineError(f"--features {uri}: {str(error).splitlines()[0]}; need one of {_KINDS}") from error
    raise PipelineError(f"--features {features}: need one of {_KINDS}")


def own_judge(store: str, name: str, dataset: Dataset, steps: int, seed: int) -> Judge:
    """The extractor that is learned on the dataset, found in the store or made and kept there.

    By classes where there are two or more, else by telling views of pictures apart.
    """
    classes = len(dataset.class_names)
    learned = "classes" if classes > 1 else "views"
    digest = identity("features", VERSION, {"steps": steps, "seed": seed, "learned": learned}, dataset.digest)
    uri = storage.join(storage.normalise(store), "features", name, digest)
    if not storage.is_published(uri):
        _learn(uri, dataset, classes, steps, seed)
    part = storage.read_manifest(uri, "features")["parts"][0]
    weights = safetensors.torch.load(storage.read_part(uri, part))
    network: nn.Module = Classifier(classes) if classes > 1 else Trunk()
    network.eval().load_state_dict(weights)
    title = f"the dataset's own {learned}, {steps} steps"
    if isinstance(network, Classifier):
        return Judge(Extractor(title, "own", part["sha256"], network.trunk), network)
    return Judge(Extractor(title, "own", part["sha256"], network), None)


def _learn(uri: str, dataset: Dataset, classes: int, steps: int, seed: int) -> None:
    """Learn an extractor and keep it. One that another run kept meanwhile is as good."""
    rows = dataset.read("train", _PICTURES)
    print(f"features: learning the dataset's own extractor, {steps} steps", flush=True)
    network: nn.Module
    if classes > 1:
        network = train_classifier(rows, classes, steps, seed)
    else:
        network = train_contrastive(rows.pixels, steps, seed)
    about = {"network": type(network).__name__, "classes": classes if classes > 1 else 0}
    data = safetensors.torch.save(network.state_dict(), {"extractor": json.dumps(about)})
    part = storage.put_part(uri, "extractor", ".safetensors", data)
    manifest = {"kind": "features", "schema": 1, "dataset": dataset.digest, "steps": steps, "seed": seed}
    storage.publish(uri, {**manifest, "parts": [part]})


def _saved(data: bytes, uri: str, checksum: str) -> Extractor:
    """An extractor that an evaluation on another dataset learned."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = header.get("__metadata__", {}).get("extractor")
    if about is None:
        raise ValueError("safetensors without the metadata of an extractor that an evaluation kept under features/")
    told = json.loads(about)
    network: nn.Module = Classifier(told["classes"]) if told["network"] == "Classifier" else Trunk()
    network.eval().load_state_dict(safetensors.torch.load(data))
    trunk = network.trunk if isinstance(network, Classifier) else network
    return Extractor(uri.rsplit("/", 1)[1], "saved", checksum, trunk)


def _inception(data: bytes, uri: str) -> nn.Module:
    """Inception-v3 with the user's weights: a state dict as safetensors, or pickled and read as weights alone."""
    weights: dict[str, Tensor] = (
        safetensors.torch.load(data)
        if uri.endswith(".safetensors")
        else torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    )
    network = Inception().eval()
    known = {name: value for name, value in weights.items() if not name.startswith(("fc.", "AuxLogits."))}
    network.load_state_dict(known)
    return network


def _exported(data: bytes) -> Any:
    """A program of torch.export."""
    return torch.export.load(io.BytesIO(data)).module()


def _script(data: bytes, uri: str, trust: bool) -> Any:
    """A TorchScript module, which may hold any code."""
    if not trust:
        raise PipelineError(f"--features {uri}: TorchScript may run any code; give --trust if you trust its source")
    return torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
