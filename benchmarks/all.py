"""Prints every figure of docs/results.md anew: runs the commands of its tables, one after another.

usage: python benchmarks/all.py [--list] [--only WORD] [--store runs/demo] [--name cartoons] [--scratch runs/bench]
                                [--tars FOLDER] [--emoji FOLDER]

Give `make demo` first: MODEL and DATASET are those of NAME in STORE. What the tables call TARS and EMOJI are folders of
shards and of pictures of yours. Commands whose folders or S3 endpoint (AWS_ENDPOINT_URL) are not there are passed over,
and told at the end, as are those that fail. All of it takes hours on 2 cores; `--only` takes what has a word in it.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs/results.md"
# Programs whose commands in the tables are run; a cell may hold other words beside them.
_PROGRAMS = ("python ", "make ")


class Figure(NamedTuple):
    """A command of the tables, and what its figures are about."""

    command: str
    about: list[str]


def figures() -> list[Figure]:
    """The commands of all tables in order, each once, with the rows that they gave."""
    found: dict[str, Figure] = {}
    last = ""
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if not line.startswith("|") or len(cells) != 5 or cells[2] in ("command", "---"):
            continue
        for command in _commands(cells[2], last):
            last = command
            found.setdefault(command, Figure(command, [])).about.append(cells[0])
    return list(found.values())


def _commands(cell: str, last: str) -> list[str]:
    """The commands in a cell: its own, the last one again, or the last one with other flags."""
    quoted = re.findall(r"`([^`]+)`", cell)
    own = [each for each in quoted if each.startswith(_PROGRAMS)]
    if own or not cell.startswith("as above"):
        return own
    return [f"{last} {' '.join(each for each in quoted if each.startswith('--'))}".strip()] if last else []


def filled(command: str, names: dict[str, str | None]) -> list[str] | str:
    """The words of a command with names in capitals replaced; the reason where one of them is not there."""
    words = []
    for word in shlex.split(command):
        if word in names:
            if names[word] is None:
                return f"no {word}"
            word = str(names[word])
        if word.startswith("s3://") and "AWS_ENDPOINT_URL" not in os.environ:
            return "no S3 endpoint"
        words.append(sys.executable if word == "python" else word)
    if "--cluster" in words:
        return "needs `ray start --head`"
    return words


def names_of(asked: argparse.Namespace) -> dict[str, str | None]:
    """What the names in capitals stand for."""
    from pipelines.config import PipelineError
    from pipelines.registry import default_model

    try:
        model: str | None = default_model(str(Path(asked.store).resolve()), asked.name)
    except PipelineError:
        model = None
    there = {"TARS": asked.tars, "EMOJI": asked.emoji}
    datasets = sorted(Path(asked.store, "datasets", asked.name).glob("*/manifest.json"))
    return {
        "MODEL": model, "DATASET": str(datasets[-1].parent) if datasets else None, "STORE": asked.store,
        "NAME": asked.name, "SCRATCH": asked.scratch, "FOLDER": f"{asked.scratch}/folder",
        **{name: at if Path(at).exists() else None for name, at in there.items()},
    }  # fmt: skip


def run(figure: Figure, words: list[str]) -> str:
    """Run a command, its output shown as it comes; what went wrong, or nothing."""
    print(f"\n$ {figure.command}", flush=True)
    for about in figure.about:
        print(f"  {about}", flush=True)
    began = time.monotonic()
    status = subprocess.run(words, cwd=ROOT, check=False).returncode
    print(f"  ({time.monotonic() - began:.0f} s)", flush=True)
    return f"ended with {status}" if status else ""


def main() -> int:
    """Run what was asked for; the exit status is 1 where a command failed."""
    parser = argparse.ArgumentParser(usage=(__doc__ or "").split("usage: ")[1].split("\n\n")[0])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--store", default="runs/demo")
    parser.add_argument("--name", default="cartoons")
    parser.add_argument("--scratch", default="runs/bench")
    parser.add_argument("--tars", default="../shared/data/clothing")
    parser.add_argument("--emoji", default="../shared/data/emoji")
    asked = parser.parse_args()
    Path(asked.scratch).mkdir(parents=True, exist_ok=True)
    names, over, failed = names_of(asked), list[str](), list[str]()
    for figure in figures():
        if asked.only not in figure.command + " ".join(figure.about):
            continue
        words = filled(figure.command, names)
        if asked.list or isinstance(words, str):
            over.append(f"{figure.command}" + (f": {words}" if isinstance(words, str) else ""))
            continue
        trouble = run(figure, words)
        failed += [f"{figure.command}: {trouble}"] if trouble else []
    for title, told in (("not run", over), ("failed", failed)):
        print("".join(f"{title}: {line}\n" for line in told), end="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
