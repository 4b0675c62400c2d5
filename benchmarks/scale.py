"""Where one driver, one manifest, one listing end: the real code on data sets of a tenth and a hundredth, and a model.

usage: python benchmarks/scale.py stream             opening a dataset of up to 1,000,000,000 pictures, and a window
       python benchmarks/scale.py plan               pictures a second that ingestion's driver assigns to shards
       python benchmarks/scale.py listing SCRATCH    time to list and to look up shards, and to find committed ones
       python benchmarks/scale.py checkpoint         what 64 workers write, and how long it takes by the store's speed

Nothing is read or drawn: manifests and keys are made up, of the sizes that the real ones have. Each size is measured in
a process of its own; the last figure of a line says how the time grew beside the size (1.0 is linear).
"""

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion_core.config import PRESETS
from pipelines import storage
from pipelines.bulk.shards import committed, record_uri
from pipelines.config import IngestConfig
from pipelines.dataset import Dataset, SampleStream, Window
from pipelines.ingest import plan as planning
from pipelines.ingest.duplicates import drop_exact
from pipelines.ingest.units import KEYS

IN_SHARD = 100_000
SHARDS = (100, 1_000, 10_000)
PLANNED = (65_536, 655_360)
LISTED = (1_000, 10_000)
WORKERS, BATCH = 64, 4096


def main() -> None:
    """Answer one question, or (by the process that asks it) measure one size."""
    questions = {"stream": stream, "plan": plan, "listing": listing, "checkpoint": checkpoint}
    sizes = {"stream-of": stream_of, "plan-of": plan_of, "listing-of": listing_of}
    match sys.argv[1:]:
        case [name] if name in questions and name != "listing":
            questions[name]("")
        case ["listing", scratch]:
            listing(scratch)
        case [name, size, *rest] if name in sizes:
            print(json.dumps(sizes[name](int(size), *rest)))
        case _:
            sys.exit(__doc__)


def measured(question: str, sizes: tuple[int, ...], *rest: str) -> list[dict[str, float]]:
    """What each size gave, in a process of its own."""
    found = []
    for size in sizes:
        command = [sys.executable, __file__, question, str(size), *rest]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append({"size": size, **json.loads(told.strip().splitlines()[-1])})
    return found


def grown(now: dict[str, float], before: dict[str, float] | None, name: str) -> str:
    """How a figure grew beside the size."""
    if before is None:
        return ""
    return f"  growth {(now[name] / max(before[name], 1e-9)) / (now['size'] / before['size']):.2f}"


def peak_mb() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def manifest_of(shards: int) -> dict[str, Any]:
    """The manifest of a dataset with so many shards."""
    names = (hashlib.sha256(str(number).encode()).hexdigest() for number in range(shards))
    listed = [
        {"name": f"shards/train-{number:05}-{digest[:16]}.parquet", "rows": IN_SHARD, "bytes": 10**9, "sha256": digest}
        for number, digest in enumerate(names)
    ]
    return {
        "kind": "dataset", "schema": 2, "shards": {"train": listed, "heldout": []}, "row_group": 256,
        "resolution": 64, "classes": {}, "sigma_data": 0.5,
    }  # fmt: skip


def stream(_: str) -> None:
    """Opening a dataset and reading from its middle."""
    before = None
    for now in measured("stream-of", SHARDS):
        print(
            f"{now['size'] * IN_SHARD:>13,} pictures in {now['size']:>6,.0f} shards: manifest "
            f"{now['bytes'] / 1e6:.2f} MB, opened in {now['open']:.2f} s, first window {now['first']:.2f} s, each "
            f"further one {now['next'] * 1e3:.2f} ms, peak memory "
            f"{now['peak']:.0f} MB (of which {now['base']:.0f} before){grown(now, before, 'bytes')}"
        )
        before = now


def stream_of(shards: int) -> dict[str, float]:
    """One size of `stream`."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = manifest_of(shards)
        storage.write_bytes(f"{folder}/manifest.json", storage.to_json(manifest))
        size = Path(folder, "manifest.json").stat().st_size
        del manifest
        base, began = peak_mb(), time.perf_counter()
        samples = SampleStream(
            Dataset(folder, storage.read_json(f"{folder}/manifest.json")), "train", 0, BATCH, WORKERS
        )
        opened = time.perf_counter()
        samples.window_rows(Window(0, 0, 0))
        first = time.perf_counter()
        for number in range(1, 51):
            samples.window_rows(Window(0, 3, number))
        end = time.perf_counter()
    return {
        "bytes": size, "open": opened - began, "first": first - opened, "next": (end - first) / 50, "peak": peak_mb(),
        "base": base,
    }  # fmt: skip


def plan(_: str) -> None:
    """What the driver of ingestion does for every picture, one after another."""
    before = None
    for now in measured("plan-of", PLANNED):
        rate = now["size"] / now["seconds"]
        print(
            f"{now['size']:>9,.0f} pictures: {now['seconds']:.1f} s, {rate:,.0f} pictures/s, peak memory "
            f"{now['peak']:.0f} MB{grown(now, before, 'seconds')}; 1,000,000,000 at this rate: "
            f"{1e9 / rate / 3600:.1f} h"
        )
        before = now


def plan_of(pictures: int) -> dict[str, float]:
    """One size of `plan`: exact duplicates dropped, classes counted, shards cut; keys in digest order."""
    tables = list(keys(pictures))
    with tempfile.TemporaryDirectory() as folder:
        config = IngestConfig(store=folder, source=[folder], shard_size=IN_SHARD)
        began, last, kept = time.perf_counter(), ("", ""), []
        for table in tables:
            rows, _, last = drop_exact(table, last)
            kept.append(planning.staged(folder, f"survivors/{len(kept):05}", [rows]))
        counts = Counter[str]()
        for table in planning._read(folder, kept):
            counts.update(planning._alive(table, {})["class"].to_pylist())
        made, told = planning.Plan(), planning.Lines(folder, "rejected/duplicates")
        planning._assign(made, config, folder, folder, kept, {}, set(), told)
        assert made.counts["kept"] == pictures
        return {"seconds": time.perf_counter() - began, "peak": peak_mb()}


def keys(pictures: int) -> Any:
    """Tables of made-up keys, as the sort delivers them."""
    for first in range(0, pictures, 8192):
        count = min(8192, pictures - first)
        numbers = np.arange(first, first + count)
        columns: dict[str, Any] = {
            "digest": [f"{number:064x}" for number in numbers],
            "source": [f"s3://b/{number}.tar#x" for number in numbers],
            "class": [f"class {number % 100}" for number in numbers],
            "heldout": numbers % 10 == 0,
        }
        arrays = [pa.array(columns.get(field.name, [_filler(field.type)] * count), field.type) for field in KEYS]
        table = pa.Table.from_arrays(arrays, schema=KEYS)
        yield table.append_column("old", pa.array([False] * count))


def _filler(kind: pa.DataType) -> Any:
    if pa.types.is_string(kind):
        return "x" * 8
    return b"\0" * 8 if pa.types.is_binary(kind) else 0


def listing(scratch: str) -> None:
    """Listing sources, and finding what is done of bulk work."""
    before = None
    for now in measured("listing-of", LISTED, scratch):
        print(
            f"{now['size']:>7,.0f} shards on {scratch}: listed in {now['list']:.2f} s, committed ones found in "
            f"{now['committed']:.2f} s{grown(now, before, 'committed')}"
        )
        before = now


def listing_of(shards: int, scratch: str) -> dict[str, float]:
    """One size of `listing`."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for shard in range(shards):
            part = storage.put_part(folder, f"part-{shard:05}", ".parquet", b"%d" % shard)
            Path(record_uri(folder, shard)).parent.mkdir(parents=True, exist_ok=True)
            record = {"part": {**part, "rows": 64}, "spent": {}}
            Path(record_uri(folder, shard)).write_bytes(storage.to_json(record))
        began = time.perf_counter()
        assert len(storage.list_objects(folder)) == 2 * shards
        listed = time.perf_counter()
        assert sum(1 for _ in committed(folder)) == shards
        return {"list": listed - began, "committed": time.perf_counter() - listed}


def checkpoint(_: str) -> None:
    """Bytes of a checkpoint by network (float32 weights, one average, AdamW), and seconds to write it by 64 workers."""
    import torch

    from diffusion_core.unet import UNet

    for name in ("small", "ddpm-32", "adm-64"):
        with torch.device("meta"):
            parameters = sum(value.numel() for value in UNet(PRESETS[name]).parameters())
        whole = parameters * 4 * 4
        for megabytes in (100, 1000):
            print(
                f"{name}: {parameters / 1e6:.1f} M parameters, {whole / 1e9:.2f} GB; at {megabytes} MB/s a worker "
                f"written by one in {whole / 1e6 / megabytes:.1f} s, by {WORKERS} that share it in "
                f"{whole / 1e6 / megabytes / WORKERS:.2f} s"
            )


if __name__ == "__main__":
    main()
