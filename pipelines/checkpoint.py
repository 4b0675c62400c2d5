"""Training state in the store: torch.distributed.checkpoint's shards, made whole by a manifest written last.

The manifest and not Ray Train is what a run resumes from: it is there for whoever has the store, with or without Ray,
and says by checksums whether a checkpoint is whole.
"""

import contextlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from diffusion_core.strategies import Ranks
from diffusion_core.training import TrainState
from pipelines import storage
from pipelines.config import PipelineError

_METADATA = ".metadata"
_ALONE = "torch.distributed is disabled"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the `last` few, and those at multiples of `every` steps (0: none). The best stays too."""

    last: int = 2
    every: int = 0

    def keeps(self, steps: list[int], best: int | None) -> set[int]:
        """Those of `steps` that stay."""
        kept = {step for step in steps if self.every and step % self.every == 0}
        return kept | set(sorted(steps)[-self.last :]) | ({best} & set(steps) if best is not None else set())


class Writer:
    """Writes the state of all ranks in the background, one checkpoint at a time, below a run's URI.

    Make it on every rank at the same time; use it as a context, which waits for what is on its way.
    """

    def __init__(self, run: str, ranks: Ranks, retention: Retention) -> None:
        self.run, self.ranks, self.retention = run, ranks, retention
        warnings.filterwarnings("ignore", _ALONE)
        # A group of its own: the training step's messages must not meet those of the writing thread.
        self.group = dist.new_group(backend="gloo") if ranks.world > 1 else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # From a GPU into pinned memory, kept from one checkpoint to the next: several times as fast.
        self.stager = BlockingAsyncStager(cache_staged_state_dict=ranks.device.type == "cuda")
        self.pending: Future[None] | None = None
        self.seconds = 0.0  # that the last checkpoint took on its way to the store

    def __enter__(self) -> "Writer":
        """Nothing to open."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last checkpoint; not in bad times for other ranks, which may be gone."""
        self.thread.shutdown(wait=kind is None or self.group is None, cancel_futures=True)

    def save(self, state: TrainState, record: dict[str, Any], best: int | None = None) -> None:
        """Copy the state and write it in the background. Raises PipelineError where the one before failed."""
        self.wait()
        staged = self.stager.stage(tensors_of(state))
        self.pending = self.thread.submit(self._write, state.step, staged, record, best)

    def wait(self) -> None:
        """Wait until what was saved is in the store. Raises PipelineError where it could not be written."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raise PipelineError where writing has failed meanwhile."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def _write(self, step: int, staged: dict[str, Any], record: dict[str, Any], best: int | None) -> None:
        folder, began = _folder(self.run, step), time.monotonic()
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch, _scratch_named(scratch):
            save(
                staged, storage_writer=FileSystemWriter(scratch, sync_files=False),
                process_group=self.group, no_dist=self.group is None,
            )  # fmt: skip
            own = [_put(folder, scratch, name) for name in sorted(os.listdir(scratch))]
        parts = self._gathered(own)
        if self.ranks.rank == 0:
            manifest = {
                "kind": "checkpoint", "schema": 2, "step": step, "world": self.ranks.world, "parts": parts,
                "record": record,
            }  # fmt: skip
            storage.publish(folder, {**manifest, "sha256": storage.digest(storage.to_json(manifest))})
            known = steps(self.run)
            for old in sorted(set(known) - self.retention.keeps(known, best)):
                storage.remove_folder(_folder(self.run, old))
        self.seconds = time.monotonic() - began

    def _gathered(self, own: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What all ranks wrote, on rank 0."""
        if self.group is None:
            return own
        every: list[Any] | None = [None] * self.ranks.world if self.ranks.rank == 0 else None
        dist.gather_object(own, every, group=self.group)
        return [part for each in every or [] for part in each]


def steps(run: str) -> list[int]:
    """Steps that have a whole checkpoint, ascending."""
    base = storage.join(run, "checkpoints")
    names = [name for name in storage.list_folders(base) if storage.is_published(storage.join(base, name))]
    return sorted(int(name.removeprefix("step-")) for name in names)


def latest_step(run: str) -> int | None:
    """The newest step that a whole checkpoint exists for, or None."""
    return max(steps(run), default=None)


def restore(
    run: str,
    state: TrainState,
    ranks: Ranks,
    group: dist.ProcessGroup | None,
    tell: Callable[[str], None],
    newest: int | None = None,
) -> dict[str, Any] | None:
    """Put the newest whole checkpoint (up to step `newest`) into `state`, however many ranks wrote it; its record.

    None where there is none. A damaged one is named to `tell`, removed, and the one before it taken. `group` is one of
    all ranks. Raises StorageError where the store does not answer.
    """
    for step in reversed(_agreed(lambda: steps(run), ranks, group)):
        if newest is not None and step > newest:
            continue
        folder = _folder(run, step)
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
            fetch, damage = _Fetch(folder, scratch), ""
            try:
                manifest = _manifest(folder)
                fetch.parts = {part["file"]: part for part in manifest["parts"]}
                fetch.share(ranks)
            except (storage.DamagedError, storage.NotFoundError) as error:
                damage = str(error)
            damages = [told for told in _all(damage, ranks, group) if told]
            if not damages:
                _load(folder, state, fetch, group)
                state.step = step
                record: dict[str, Any] = manifest["record"]
                return record
        if ranks.rank == 0:
            tell(f"checkpoint of step {step} is damaged and removed, taking the one before it: {damages[0]}")
            storage.remove_folder(folder)
    return None


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """All tensors of the state under flat names, sharded as they are."""
    tensors: dict[str, Tensor] = {f"weights.{name}": value for name, value in state.network.state_dict().items()}
    for number, average in enumerate(state.ema):
        tensors |= {f"ema.{number}.{name}": value for name, value in average.items()}
    for name, parameter in state.network.named_parameters():
        slots = state.optimizer.state[parameter]
        tensors |= {f"optimizer.{name}.{slot}": value for slot, value in slots.items()}
    return {name: value.detach() for name, value in tensors.items()}


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors as whole ones on the CPU; every rank must call it."""
    return {name: _whole(value).detach().cpu().contiguous() for name, value in tensors.items()}


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


class _Fetch:
    """Brings files of a checkpoint into a folder on this machine, each once and verified."""

    def __init__(self, folder: str, scratch: str) -> None:
        self.folder, self.scratch = folder, scratch
        self.parts: dict[str, dict[str, Any]] = {}

    def __call__(self, name: str) -> None:
        path = os.path.join(self.scratch, name)
        if not os.path.exists(path):
            data = storage.read_part(self.folder, self.parts[name])
            with open(path, "wb") as file:
                file.write(data)

    def share(self, ranks: Ranks) -> None:
        """A rank's share of all files, so that together they have verified every one; and what each needs."""
        data = sorted(name for name in self.parts if name != _METADATA)
        for name in [_METADATA, *data[ranks.rank :: ranks.world]]:
            self(name)


class _Reader(FileSystemReader):
    """Reads from the folder that `fetch` fills with what a rank's plan needs."""

    def __init__(self, fetch: _Fetch) -> None:
        super().__init__(fetch.scratch)
        self.fetch = fetch

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """As the parent, once the files are here."""
        for item in plan.items:
            self.fetch(self.storage_data[item.storage_index].relative_path)
        return super().read_data(plan, planner)


def _load(folder: str, state: TrainState, fetch: _Fetch, group: dist.ProcessGroup | None) -> None:
    """Fill the state's tensors in place. Their metadata is a pickle: its checksum was compared before."""
    try:
        load(
            dict(tensors_of(state)), storage_reader=_Reader(fetch), process_group=group, no_dist=group is None,
            planner=DefaultLoadPlanner(),
        )  # fmt: skip
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        if isinstance(first, PipelineError):
            raise first from error
        raise PipelineError(f"{folder}: does not fit this model ({first}); delete it to start again") from error


def _folder(run: str, step: int) -> str:
    return storage.join(run, "checkpoints", f"step-{step:07}")


def _manifest(folder: str) -> dict[str, Any]:
    """A checkpoint's manifest. Raises DamagedError where it is not the one that was written."""
    uri = storage.join(folder, storage.MANIFEST)
    try:
        manifest: dict[str, Any] = json.loads(storage.read_bytes(uri))
        intact = manifest.pop("sha256") == storage.digest(storage.to_json(manifest))
    except (ValueError, AttributeError, KeyError):
        intact = False
    if not intact:
        raise storage.DamagedError(f"{uri}: not the manifest that was written")
    return manifest


def _put(folder: str, scratch: str, name: str) -> dict[str, Any]:
    """Upload a file; its entry for the manifest remembers the name it had."""
    with open(os.path.join(scratch, name), "rb") as file:
        data = file.read()
    stem = "metadata" if name == _METADATA else name.strip("_").removesuffix(".distcp")
    return {"file": name, **storage.put_part(folder, stem, ".distcp", data)}


@contextlib.contextmanager
def _scratch_named(scratch: str) -> Iterator[None]:
    """An error of the disk that shards are gathered on, in one line."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        raise PipelineError(
            f"{scratch}: a checkpoint could not be gathered here ({str(error).splitlines()[0]}); free space, or point "
            "TMPDIR at a larger disk, and run the same command again"
        ) from error


def _agreed(find: Callable[[], list[int]], ranks: Ranks, group: dist.ProcessGroup | None) -> list[int]:
    """What rank 0 found."""
    if group is None:
        return find()
    told: list[Any] = [find() if ranks.rank == 0 else None]
    dist.broadcast_object_list(told, src=0, group=group)
    found: list[int] = told[0]
    return found


def _all(mine: str, ranks: Ranks, group: dist.ProcessGroup | None) -> list[str]:
    """What every rank says."""
    if group is None:
        return [mine]
    every: list[Any] = [None] * ranks.world
    dist.all_gather_object(every, mine, group=group)
    return every
