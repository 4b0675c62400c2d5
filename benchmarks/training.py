"""What training costs beside its arithmetic: reading, checkpoints, the loop, more workers; and what a device reaches.

usage: python benchmarks/training.py data SCRATCH [--preset cpu-small] [--batch 32] [--steps 60] [--rounds 3]
       python benchmarks/training.py stall SCRATCH [--preset small] [--batch 32] [--rounds 5]
       python benchmarks/training.py overhead SCRATCH [--preset cpu-small] [--batch 32] [--steps 60] [--rounds 5]
       python benchmarks/training.py scaling SCRATCH [--preset cpu-small] [--batch 32] [--steps 40] [--rounds 3]
       python benchmarks/training.py device [--preset adm-64] [--batch 64] [--precision bfloat16] [--rounds 5]

SCRATCH keeps a store of drawn cartoons from one call to the next.
data: share of the step time that the loop waits for 64x64 pictures, by the run's own figures; then the wait for a
batch when something takes batches at a given pace and leaves the processor alone, as a faster device does.
stall: time that a checkpoint takes from the steps beside it, on disk and on a real S3 endpoint, against steps without
one; blocks of steps in turns. The CPU time counts what the writing thread takes, too.
overhead: the loop of the stage against a loop by hand with the same network, optimiser, clipping and average on
pictures in memory: in one process in turns, by CPU time, and under Ray Train against a process without Ray, in turns.
scaling: step time on 1 and 2 workers at the same global batch, by ddp and fsdp.
All of these compute with one thread in each process.
device: needs torch alone; see device.py.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import device
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# What needs more than torch is imported where it is used: `device` is to run without it.
from diffusion_core.config import PRESETS, ModelConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.ema import Profile
from diffusion_core.strategies import Ranks
from diffusion_core.training import Batch, Optimisation, TrainState, new_state, train_step
from diffusion_core.unet import UNet

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

CHECKPOINT_EVERY = 200
# Of the arithmetic; what goes on beside it has the other core, as it has the processor beside a GPU.
THREADS = 1
BLOCK = 10
PICTURES = 4000
PACES = (500, 2000, 8000)
PACE_S = 8.0
PORT = 19600
DEFAULTS: dict[str, dict[str, Any]] = {
    "data": {"preset": "cpu-small", "batch": 32, "steps": 60, "rounds": 3},
    "stall": {"preset": "small", "batch": 32, "rounds": 5},
    "overhead": {"preset": "cpu-small", "batch": 32, "steps": 60, "rounds": 5},
    "scaling": {"preset": "cpu-small", "batch": 32, "steps": 40, "rounds": 3},
    "device": {"rounds": 5},
    "bare": {"steps": 60},
}


def main() -> None:
    """Run the question that was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=list(DEFAULTS))
    parser.add_argument("scratch", nargs="?", default="")
    parser.add_argument("--preset", default="")
    parser.add_argument("--precision", default="")
    for name in ("batch", "steps", "rounds"):
        parser.add_argument(f"--{name}", type=int, default=0)
    asked = parser.parse_args()
    for name, value in DEFAULTS[asked.question].items():
        setattr(asked, name, getattr(asked, name) or value)
    if asked.question != "device" and not asked.scratch:
        parser.error(f"{asked.question} needs SCRATCH, a folder for its store")
    answers = {"data": data, "stall": stall, "overhead": overhead, "scaling": scaling, "device": device.run}
    (answers | {"bare": bare_process})[asked.question](asked)


class Windows(NamedTuple):
    """What a run told of every ten steps: seconds a step, and the share of them that it waited for data."""

    seconds: list[float]
    waits: list[float]


def data(asked: argparse.Namespace) -> None:
    """Waiting for pictures of 64x64."""
    dataset = cartoons(asked.scratch, 64)
    told = [trained(dataset, asked, workers=1) for _ in range(asked.rounds)]
    step = statistics.median(second for windows in told for second in windows.seconds)
    share = statistics.median(wait for windows in told for wait in windows.waits)
    print(
        f"data: {asked.preset}, {asked.batch} pictures: {1e3 * step:.0f} ms a step, of them waiting {share:.2%} "
        f"(goal 2 %), {1e3 * share * step:.2f} ms a batch"
    )
    for pace in PACES:
        wait = paced(dataset, pace, 128)
        print(
            f"data: 128 pictures taken at {pace} a second: waiting {1e3 * wait:.2f} ms a batch, "
            f"{min(wait * pace / 128, 1):.2%} of the time"
        )


def paced(dataset: str, pace: int, count: int) -> float:
    """Mean seconds of waiting for a batch that is read and made ahead."""
    from pipelines.config import TrainConfig
    from pipelines.dataset import SampleStream, open_dataset
    from pipelines.train.batches import fetched, to_batch

    opened, config = open_dataset(dataset), TrainConfig(dataset=dataset, global_batch_size=count)
    stream = SampleStream(opened, "train", 0, count, config.streams)
    rows, place = stream.batches(0, 10**6, ahead=True), torch.from_numpy(stream.places())
    made = (to_batch(each, place, config, step, len(opened.class_names)) for step, each in enumerate(rows))
    batches = fetched(made, place.device)
    next(batches)
    waits, begun = list[float](), time.perf_counter()
    while time.perf_counter() - begun < PACE_S:
        began = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - began)
        time.sleep(max(0.0, count / pace - waits[-1]))
    batches.close()  # type: ignore[attr-defined]
    return statistics.mean(waits)


def stall(asked: argparse.Namespace) -> None:
    """What a checkpoint takes from the steps beside it."""
    from pipelines.checkpoint import Retention, Writer, tensors_of

    state, step = core_step(asked.preset, asked.batch)
    step()
    size = sum(value.nbytes for value in tensors_of(state).values())
    print(f"stall: {asked.preset}, state of {size / 1e6:.0f} MB, {asked.batch} pictures")
    with s3_bucket(asked.scratch) as bucket, tempfile.TemporaryDirectory(dir=asked.scratch) as folder:
        for kind, run in (("disk", f"{folder}/run"), ("S3", f"{bucket}/run")):
            with Writer(run, Ranks(), Retention(last=2)) as writer:
                told = stalls(writer, state, step, asked.rounds)
            report_stall(kind, told, step)


class Stall(NamedTuple):
    """Of one block of steps with a checkpoint and one without: wall and CPU seconds lost; seconds of the copy."""

    wall: float
    cpu: float
    copy: float


def stalls(writer: Any, state: TrainState, step: Callable[[], object], rounds: int) -> list[Stall]:
    """A block with a checkpoint at its beginning and one without, in turns; each as long as writing takes."""
    alone = write_alone(writer, state)
    count = max(4, round(2.5 * alone / timed(step, 2)[0]))
    told = []
    for _ in range(rounds):
        plain = timed(step, count)
        began = time.perf_counter(), time.process_time()
        writer.save(advanced(state), {})
        copied = time.perf_counter() - began[0]
        timed(step, count)
        with_one = time.perf_counter() - began[0], time.process_time() - began[1]
        if not writer.pending.done():
            print("stall: writing outlasted its block of steps, so some of its cost is missing here")
        writer.wait()
        told.append(Stall(with_one[0] - count * plain[0], with_one[1] - count * plain[1], copied))
    return told


def write_alone(writer: Any, state: TrainState) -> float:
    """Seconds of one checkpoint with nothing beside it, after one that warms up."""
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        writer.save(advanced(state), {})
        writer.wait()
        seconds = time.perf_counter() - began
    print(f"stall: a checkpoint with nothing beside it takes {seconds:.2f} s")
    return seconds


def advanced(state: TrainState) -> TrainState:
    """The state, as of a step that has no checkpoint yet."""
    state.step += 1
    return state


def report_stall(kind: str, told: list[Stall], step: Callable[[], object]) -> None:
    """Shares of the time between two checkpoints."""
    wall, cpu = timed(step, 4)
    lost, spent = (statistics.median(getattr(each, name) for each in told) for name in ("wall", "cpu"))
    spread = sorted(each.wall for each in told)
    print(
        f"stall, {kind}: {lost:.3f} s lost ({spread[0]:.3f} to {spread[-1]:.3f}) at a step of {wall:.2f} s: "
        f"{lost / (CHECKPOINT_EVERY * wall):.2%} at one every {CHECKPOINT_EVERY} steps (goal 1 %); CPU time "
        f"{spent:.3f} s of {cpu:.2f} s a step, {spent / (CHECKPOINT_EVERY * cpu):.2%}; "
        f"the copy alone {1e3 * statistics.median(each.copy for each in told):.1f} ms"
    )


def overhead(asked: argparse.Namespace) -> None:
    """The stage's loop against one by hand."""
    dataset = cartoons(asked.scratch, 32)
    in_one_process(dataset, asked)
    from pipelines import jobs

    ours, bare = list[float](), list[float]()
    for _ in range(asked.rounds):
        ours += trained(dataset, asked, workers=1).seconds
        jobs.disconnect()
        bare += bare_run(dataset, asked)
    ratio = statistics.median(ours) / statistics.median(bare)
    print(
        f"overhead: under Ray Train {1e3 * statistics.median(ours):.1f} ms a step, by hand without Ray "
        f"{1e3 * statistics.median(bare):.1f} ms, ratio {ratio:.3f} (goal 1.03); fastest of each "
        f"{1e3 * min(ours):.1f} and {1e3 * min(bare):.1f} ms, ratio {min(ours) / min(bare):.3f}"
    )


def in_one_process(dataset: str, asked: argparse.Namespace) -> None:
    """Blocks of steps of the stage's loop and of the loop by hand, in turns, by CPU time."""
    from pipelines.progress import Progress
    from pipelines.train import loop
    from pipelines.train.session import Host, open_session

    with tempfile.TemporaryDirectory(prefix="benchmark-") as store:
        config = settings(dataset, store, asked, steps=10**6)
        session = open_session(config, Ranks(), Host(emit=lambda _: None))
        batches, progress = loop._batches(session), Progress("train", config.steps, "steps", emit=lambda _: None)
        works = {
            "stage": lambda: loop._advance(session, batches, progress),
            "core": core_step(asked.preset, asked.batch)[1],
            "hand": ByHand(dataset, asked.preset, asked.batch).step,
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for number in range(asked.rounds + 1):
            for name, work in works.items():
                told = timed(work, BLOCK // 2)
                seconds[name] += [told] if number else []
        session.events.close()
    wall, cpu = (
        {name: statistics.median(each[kind] for each in told) for name, told in seconds.items()} for kind in (0, 1)
    )
    print(
        f"overhead in one process, {asked.preset}, {asked.batch} pictures, CPU time a step: by hand "
        f"{1e3 * cpu['hand']:.1f} ms, the core's step over it {cpu['core'] / cpu['hand']:.3f}, "
        f"the stage's loop {cpu['stage'] / cpu['hand']:.3f}; wall time {wall['core'] / wall['hand']:.3f}, "
        f"{wall['stage'] / wall['hand']:.3f}"
    )


class ByHand:
    """A training loop as one writes it by hand: EDM's loss, AdamW, clipping, an average; pictures in memory."""

    def __init__(self, dataset: str, preset: str, count: int) -> None:
        from pipelines.dataset import open_dataset
        from pipelines.images import to_floats

        torch.set_num_threads(THREADS)
        self.network = network_of(preset, open_dataset(dataset))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=2e-3, betas=(0.9, 0.99), fused=True)
        self.average = [parameter.detach().clone() for parameter in self.network.parameters()]
        rows = open_dataset(dataset).read("train")
        self.pictures = torch.from_numpy(to_floats(rows.pixels)).contiguous(memory_format=torch.channels_last)
        self.labels, self.count, self.number = torch.from_numpy(rows.labels), count, 0

    def step(self) -> None:
        """One step; the loss is read every ten."""
        at = torch.randint(len(self.pictures), (self.count,))
        x0, label, d = self.pictures[at], self.labels[at], 0.5
        sigma = torch.exp(torch.randn(self.count) * 1.2 - 1.2)[:, None, None, None]
        x = x0 + sigma * torch.randn_like(x0)
        total = sigma**2 + d**2
        target = (x0 - x * d**2 / total) / (sigma * d / total.sqrt())
        answer = self.network(x / total.sqrt(), sigma.flatten().log() / 4, label)
        loss = (answer - target).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        torch._foreach_lerp_(self.average, [each.detach() for each in self.network.parameters()], 0.01)
        self.number += 1
        if self.number % BLOCK == 0:
            loss.item()


def bare_run(dataset: str, asked: argparse.Namespace) -> list[float]:
    """Seconds a step of the loop by hand, a median of every ten, in a process of its own."""
    command = [sys.executable, __file__, "bare", dataset, "--preset", asked.preset, "--batch", str(asked.batch)]
    run = subprocess.run([*command, "--steps", str(asked.steps)], capture_output=True, text=True, check=True)
    seconds: list[float] = json.loads(run.stdout.splitlines()[-1])
    return seconds


def bare_process(asked: argparse.Namespace) -> None:
    """The loop by hand, as a process."""
    hand = ByHand(asked.scratch, asked.preset, asked.batch)
    print(json.dumps([timed(hand.step, BLOCK)[0] for _ in range(asked.steps // BLOCK)][1:]))


def scaling(asked: argparse.Namespace) -> None:
    """Step time by workers and strategy."""
    dataset = cartoons(asked.scratch, 32)
    ways: dict[str, dict[str, Any]] = {
        "1 worker": {"workers": 1},
        "2 workers, ddp": {"workers": 2},
        "2 workers, fsdp": {"workers": 2, "strategy": "fsdp"},
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(asked.rounds):
        for name, more in ways.items():
            seconds[name] += trained(dataset, asked, **more).seconds
    for name, each in seconds.items():
        faster = statistics.median(seconds["1 worker"]) / statistics.median(each)
        print(
            f"scaling: {name:16} {1e3 * statistics.median(each):7.1f} ms a step (fastest {1e3 * min(each):.1f}), "
            f"{faster:.2f} times the rate of 1 worker, by the fastest {min(seconds['1 worker']) / min(each):.2f}"
        )


def core_step(preset: str, count: int) -> tuple[TrainState, Callable[[], object]]:
    """A training state of random pictures, and a work that takes the core's own step with it."""
    torch.set_num_threads(THREADS)
    size = PRESETS[preset].resolution
    network = UNet(PRESETS[preset]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    how = Optimisation(
        steps=10**6, learning_rate=1e-3, warmup=1, clip=1.0, weight_decay=0.0, label_dropout=0.1,
        ema=(Profile("power", 0.1),), seed=0, global_batch_size=count,
    )  # fmt: skip
    state = new_state(Denoiser(network, ModelConfig(PRESETS[preset])), network, how)
    x0 = (torch.rand(count, 3, size, size) * 2 - 1).contiguous(memory_format=torch.channels_last)
    ids = torch.arange(count)
    return state, lambda: train_step(state, Batch(x0, None, ids, ids), how)


def network_of(preset: str, dataset: Any) -> nn.Module:
    """The network that the stage would train on the dataset."""
    from pipelines.config import TrainConfig
    from pipelines.train.plan import model_config

    config = TrainConfig(dataset=dataset.uri, preset=preset)
    return UNet(model_config(config, dataset).unet).to(memory_format=torch.channels_last)


def cartoons(scratch: str, resolution: int) -> str:
    """URI of a dataset of drawn cartoons."""
    from pipelines import jobs
    from pipelines.config import DrawConfig, IngestConfig

    place: dict[str, Any] = {"store": f"{scratch}/store", "name": f"cartoons-{resolution}"}
    drawn = jobs.run_stage("draw", DrawConfig(count=PICTURES, resolution=resolution, **place))
    taken = IngestConfig(source=[f"{drawn.uri}/*.tar"], resolution=resolution, **place)
    return jobs.run_stage("ingest", taken).uri


def settings(dataset: str, store: str, asked: argparse.Namespace, **more: Any) -> Any:
    """Training settings without validation and checkpoints before the end."""
    from pipelines.config import TrainConfig

    plain = {"validate_every": 0, "checkpoint_every": 10**6, "threads": THREADS}
    asked_for = {"preset": asked.preset, "global_batch_size": asked.batch}
    return TrainConfig(dataset=dataset, store=store, **{**plain, **asked_for, **more})


def trained(dataset: str, asked: argparse.Namespace, **more: Any) -> Windows:
    """What a run under Ray Train tells of itself in TensorBoard, but for its first ten steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from pipelines import jobs

    with tempfile.TemporaryDirectory(prefix="benchmark-") as store:
        config = settings(dataset, store, asked, **{"steps": asked.steps, **more})
        with contextlib.redirect_stdout(sys.stderr):
            jobs.run_stage("train", config)
        (folder,) = Path(store).glob("models/*/*/tensorboard")
        events = EventAccumulator(str(folder)).Reload()
        rates = [event.value for event in events.Scalars("pictures a second")]
        waits = [event.value for event in events.Scalars("data wait share")]
    return Windows([asked.batch / rate for rate in rates[1:]], waits[1:])


def timed(work: Callable[[], object], count: int) -> tuple[float, float]:
    """Wall and CPU seconds (of all threads) of one of `count` calls."""
    began = time.perf_counter(), time.process_time()
    for _ in range(count):
        work()
    return (time.perf_counter() - began[0]) / count, (time.process_time() - began[1]) / count


@contextlib.contextmanager
def s3_bucket(scratch: str) -> Iterator[str]:
    """A new bucket on a real S3 endpoint (OpenStack Swift on loopback), whose data lies in SCRATCH."""
    import s3fs

    program = [
        str(ROOT / ".venv-s3/bin/python"),
        str(ROOT / "tests/support/swift_s3.py"),
        f"{scratch}/swift",
        str(PORT),
    ]
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test:tester", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}",
    }  # fmt: skip
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            if not server.stdout.readline().startswith("ready"):
                sys.exit(f"error: no S3 endpoint on port {PORT}; run make setup, and see {scratch}/swift/log")
            name = f"stall-{uuid.uuid4().hex[:12]}"
            s3fs.S3FileSystem().mkdir(name)
            yield f"s3://{name}"
        finally:
            server.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    main()
