"""A picture made again on this machine, and compared with the one that is there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines import storage
from pipelines.config import PipelineError
from pipelines.images import from_png, to_png
from pipelines.model import load_model
from pipelines.progress import print_line
from pipelines.requests import request_of
from pipelines.worker import LANES, Worker

Numerics = dict[str, str | int]
_AT_A_TIME = 64


@dataclass(frozen=True)
class Record:
    """A picture that was made: its name, its PNG, what was asked for, and the profile of its device where known.

    `files` are the URIs of the picture and the mask that were edited, where they are known.
    """

    name: str
    data: bytes
    texts: dict[str, str]
    numerics: Numerics | None
    files: dict[str, str | None]


def remake(model: str, records: Sequence[Record], files: dict[str, bytes | None]) -> None:
    """Make pictures again with the model at a URI, on as many lanes and threads as before; say how they compare.

    `files` are the `image` and the `mask` of an edit, where others than the records name. Raises RequestError where
    those are not what was edited, PipelineError where the model is another one, or pictures differ although they were
    made on such a device.
    """
    told = records[0].numerics
    loaded = load_model(model)
    other = next((record for record in records if record.texts["model"] != loaded.digest), None)
    if other is not None:
        raise PipelineError(
            f"{other.name}: made by model {other.texts['model'][:12]}, but {model} is {loaded.digest[:12]}"
        )
    lanes, threads = (int(told["lanes"]), int(told.get("threads", 0))) if told else (LANES, 0)
    worker = Worker(loaded, lanes=lanes, threads=threads)
    made = list(_made(worker, records, files))
    changed = [(record, png) for record, png in made if png != record.data]
    if not changed:
        print_line(f"remake: equal, {sum(len(png) for _, png in made)} bytes of {len(made)} pictures")
        return
    print_line("\n".join(f"remake: {record.name}: {_difference(record.data, png)}" for record, png in changed))
    here = worker.profile
    if told == here:
        raise PipelineError(
            f"remake: {len(changed)} of {len(made)} pictures differ, though made on the same kind of device: "
            f"{_worded(here)}; has the picture or the code been changed?"
        )
    was = f"made on {_worded(told)}" if told else "the picture does not say on what device it was made"
    print_line(f"remake: bytes repeat on the same kind of device alone; here {_worded(here)}; {was}")


def _made(worker: Worker, records: Sequence[Record], files: dict[str, bytes | None]) -> Iterator[tuple[Record, bytes]]:
    """Every record with its picture as it is made now."""
    for start in range(0, len(records), _AT_A_TIME):
        some = records[start : start + _AT_A_TIME]
        pictures = worker.paint([request_of(record.texts, **_files(record, files)) for record in some])
        yield from ((record, to_png(made, record.texts)) for record, made in zip(some, pictures, strict=True))


def _files(record: Record, given: dict[str, bytes | None]) -> dict[str, bytes | None]:
    """The files of an edit: as given, or as the record names them. Raises StorageError where they are gone."""
    read = {name: storage.read_bytes(uri) for name, uri in record.files.items() if uri and given.get(name) is None}
    return {**given, **read}


def _difference(old: bytes, new: bytes) -> str:
    """How far two PNGs are apart."""
    ours, theirs = from_png(new).astype(np.int64), from_png(old).astype(np.int64)
    if ours.shape != theirs.shape:
        return f"{theirs.shape[1]}x{theirs.shape[0]} pixels before, {ours.shape[1]}x{ours.shape[0]} now"
    error = np.abs(ours - theirs)
    if not error.any():
        return "the same pixels, packed or described otherwise"
    return f"{np.count_nonzero(error)} of {error.size} values differ, by {error.max()} at most"


def _worded(numerics: Numerics) -> str:
    return ", ".join(f"{name} {value}" for name, value in numerics.items())
