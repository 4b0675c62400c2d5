"""Cost of ingestion beside decoding, growth of its memory, and speed of reading the dataset again.

usage: python benchmarks/ingest.py speed TARS SCRATCH [--source URI] [--resolution 64] [--rounds 3]
       python benchmarks/ingest.py files FOLDER SCRATCH
       python benchmarks/ingest.py memory TARS SCRATCH
       python benchmarks/ingest.py stream DATASET

speed: pictures a second of ingestion against a bare loop that reads the same tars and decodes and resizes the same
bytes with the same library on the same cores, plainly and with `reducing_gap` as ingestion does; and against webdataset
with Pillow (`pip install webdataset`; left out where it is missing); in turns. With --source the same tars are ingested
from there (s3://…) instead of TARS.
files: the same for a folder of small pictures at 32x32, as time per picture.
memory: peak memory of `python -m pipelines ingest` on the pictures of TARS and on eight variants of each.
stream: training's sample stream against the bare read of the Parquet column.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from demo import own_bytes, tree
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipelines import ingest, jobs, storage
from pipelines.config import IngestConfig
from pipelines.dataset import SampleStream, open_dataset
from pipelines.ingest import stage

VARIANTS = 8
BATCH, SECONDS = 256, 6.0


def main() -> None:
    """Run the question that was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=["speed", "files", "memory", "stream"])
    parser.add_argument("data")
    parser.add_argument("scratch", nargs="?", default="")
    parser.add_argument("--source", default="")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    {"speed": speed, "files": files, "memory": memory, "stream": stream}[parser.parse_args().question](
        parser.parse_args()
    )


def speed(asked: argparse.Namespace) -> None:
    """Rates from tars, in turns."""
    tars = sorted(str(path) for path in Path(asked.data).glob("*.tar"))
    source = asked.source or f"{asked.data}/*.tar"
    ways: dict[str, Callable[[int], tuple[int, float]]] = {
        "bare loop": lambda _: bare([(tar, asked.resolution) for tar in tars], from_tar),
        "bare, means": lambda _: bare([(tar, -asked.resolution) for tar in tars], from_tar),
        "ingest": lambda n: ours(source, asked.scratch, f"speed-{n}", asked.resolution),
    }
    if importable("webdataset"):
        ways["webdataset"] = lambda _: by_webdataset(tars, asked.resolution)
    turns(ways, asked.rounds)


def files(asked: argparse.Namespace) -> None:
    """Rates from loose files, in turns."""
    paths = sorted(str(path) for path in Path(asked.data).iterdir())
    parts = [(paths[start : start + 256], 32) for start in range(0, len(paths), 256)]
    turns(
        {
            "bare loop": lambda _: bare(parts, from_files),
            "ingest": lambda n: ours(asked.data, asked.scratch, f"files-{n}", 32),
        },
        asked.rounds,
    )


def turns(ways: dict[str, Callable[[int], tuple[int, float]]], rounds: int) -> None:
    """Every way once to warm up, then in turns; medians, and ratios to the bare loop within a round."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            count, seconds = way(number)
            if number:
                rates[name].append(count / seconds)
    for name, values in rates.items():
        ratios = [own / bare_rate for own, bare_rate in zip(values, rates["bare loop"], strict=True)]
        rate = statistics.median(values)
        print(
            f"{name:12} {rate:7.0f} pictures/s  {1000 / rate:6.3f} ms  {statistics.median(ratios):.2f} of the bare loop"
        )


def ours(source: str, scratch: str, name: str, resolution: int) -> tuple[int, float]:
    """Pictures read, and the seconds that reading them took; the whole run's seconds are printed."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    jobs.connect()
    config = IngestConfig(source=[source], store=scratch, name=name, resolution=resolution)
    seconds: list[float] = []
    read = stage._read

    def timed(*arguments: object) -> None:
        began = time.monotonic()
        read(*arguments)  # type: ignore[arg-type]
        seconds.append(time.monotonic() - began)

    stage._read = timed
    began = time.monotonic()
    try:
        outcome = ingest.run(config)
    finally:
        stage._read = read
    found = storage.read_manifest(outcome.uri, "dataset")["counts"]["found"]
    print(f"  whole run {time.monotonic() - began:.1f} s, of it reading {seconds[0]:.1f} s")
    return found, seconds[0]


def bare(parts: list[tuple[object, int]], read: Callable[[tuple[object, int]], int]) -> tuple[int, float]:
    """Pictures and seconds of a plain loop, a process a core."""
    # Not forked: this process runs Ray's threads. Its start and imports are not counted.
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        pool.map(time.sleep, [0.5] * (os.cpu_count() or 1), chunksize=1)
        began = time.monotonic()
        count = sum(pool.imap_unordered(read, parts, chunksize=1))
        return count, time.monotonic() - began


def from_tar(part: tuple[str, int]) -> int:
    """Decode and resize every JPEG of a tar."""
    path, resolution = part
    count = 0
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                reader = tar.extractfile(member)
                assert reader is not None
                count += len(resized(reader.read(), resolution)) > 0
    return count


def from_files(part: tuple[list[str], int]) -> int:
    """Decode and resize files."""
    paths, resolution = part
    return sum(len(resized(Path(path).read_bytes(), resolution)) > 0 for path in paths)


def resized(data: bytes, resolution: int) -> np.ndarray:
    """As plainly as Pillow does it, transparency over white; a negative resolution takes `reducing_gap`."""
    image = Image.open(io.BytesIO(data))
    if image.mode in ("RGBA", "P", "LA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    if resolution > 0:
        return np.array(ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS))
    left, top = ((size - min(image.size)) / 2 for size in image.size)
    box = (left, top, image.width - left, image.height - top)
    return np.array(image.resize((-resolution, -resolution), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0))


def by_webdataset(tars: list[str], resolution: int) -> tuple[int, float]:
    """Pictures and seconds of webdataset in torch's DataLoader, a worker a core, its start not counted."""
    import torch.utils.data
    import webdataset

    data = webdataset.WebDataset(tars, shardshuffle=False).map(lambda sample: resized(sample["jpg"], resolution))
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=os.cpu_count() or 1)
    samples = iter(loader)
    next(samples)
    began = time.monotonic()
    return sum(1 for _ in samples), time.monotonic() - began


def importable(name: str) -> bool:
    """Whether a module is installed."""
    import importlib.util

    return importlib.util.find_spec(name) is not None


def memory(asked: argparse.Namespace) -> None:
    """Peak memory by number of items."""
    peaks = []
    for variants in (1, VARIANTS):
        folder = Path(asked.scratch) / f"variants-{variants}"
        if not folder.exists():
            folder.mkdir(parents=True)
            with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
                work = [(tar, folder, number) for tar in Path(asked.data).glob("*.tar") for number in range(variants)]
                pool.starmap(write_variant, work)
        peaks.append(peak(folder, Path(asked.scratch) / f"store-{variants}"))
        print(f"{variants} x: peak {peaks[-1] / 1e6:.0f} MB")
    print(f"{VARIANTS} x the items: {peaks[1] / peaks[0]:.2f} of the memory")


def write_variant(tar: Path, folder: Path, number: int) -> None:
    """A tar of other pictures, cut a little differently from those of `tar`."""
    with tarfile.open(tar) as source, tarfile.open(folder / f"{tar.stem}-{number}.tar", "w") as out:
        for member in source:
            reader = source.extractfile(member)
            assert reader is not None
            data = reader.read()
            if member.name.endswith(".jpg"):
                image = Image.open(io.BytesIO(data)).convert("RGB")
                image = image.crop((2 * number, number, image.width, image.height)).resize((200, 266))
                buffer = io.BytesIO()
                image.save(buffer, "JPEG")
                data = buffer.getvalue()
            info = tarfile.TarInfo(member.name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


def peak(source: Path, store: Path) -> int:
    """Most bytes that an ingestion's processes hold of their own."""
    command = [sys.executable, "-m", "pipelines", "ingest", "--source", f"{source}/*.tar", "--store", str(store)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    most = 0
    with subprocess.Popen([*command, "--resolution", "64"], cwd=ROOT, env=environment) as run:
        while run.poll() is None:
            most = max(most, sum(own_bytes(pid) for pid in tree(run.pid)))
            time.sleep(0.2)
    if run.returncode:
        sys.exit(f"error: ingestion ended with {run.returncode}")
    return most


def stream(asked: argparse.Namespace) -> None:
    """The sample stream's rate, read here and by Ray Data ahead, against the bare Parquet read."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    jobs.connect()
    dataset = open_dataset(asked.data)
    samples = SampleStream(dataset, "train", 0, BATCH, 4)
    rates: dict[str, list[float]] = {"bare Parquet read": [], "stream": [], "stream, read ahead": []}
    for _ in range(3):
        rates["bare Parquet read"].append(bare_read(dataset))
        rates["stream"].append(batches(samples, ahead=False))
        rates["stream, read ahead"].append(batches(samples, ahead=True))
    for name, values in rates.items():
        share = statistics.median(own / base for own, base in zip(values, rates["bare Parquet read"], strict=True))
        print(f"{name:18} {statistics.median(values):9.0f} pictures/s  {share:.2f} of the bare read")


def bare_read(dataset: open_dataset) -> float:  # type: ignore[valid-type]
    """Pictures a second of reading the image column of every shard from disk."""
    began, count = time.monotonic(), 0
    while time.monotonic() - began < SECONDS / 2:
        for shard in dataset.manifest["shards"]["train"]:  # type: ignore[attr-defined]
            folder, _ = dataset.place(shard)  # type: ignore[attr-defined]
            table = pq.read_table(storage.join(folder, shard["name"]), columns=["image"])
            images = table["image"].combine_chunks().field("bytes").to_pylist()
            count += len([np.frombuffer(data, np.uint8) for data in images])
    return count / (time.monotonic() - began)


def batches(samples: SampleStream, ahead: bool) -> float:
    """Pictures a second of the stream, from its second batch on."""
    source = samples.batches(0, 10**6, ahead)
    next(source)
    began, count = time.monotonic(), 0
    while time.monotonic() - began < SECONDS:
        count += len(next(source).ids)
    seconds = time.monotonic() - began
    source.close()  # type: ignore[attr-defined]
    return count / seconds


if __name__ == "__main__":
    main()
