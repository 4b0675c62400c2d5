"""The forget command: what to make anew so that a source has no part in anything, in order and with every command."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipelines.config import EvaluateConfig, ForgetConfig, GenerateConfig, IngestConfig, PipelineError, TrainConfig
from pipelines.lineage.contents import Contents, command, read_contents, run_of
from pipelines.lineage.spread import Spread, spread_of
from pipelines.progress import print_line
from pipelines.registry import Entry


@dataclass
class _Steps:
    """The commands so far: each thing that must be made anew once, after all that it is made from.

    `names` is what stands in later commands for a URI, `made` the name by command: the same command is given once.
    """

    contents: Contents
    spread: Spread
    source: str
    lines: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)

    def dataset(self, uri: str) -> None:
        """Put down how to make a dataset anew; and first the image sets that it was read from."""
        if uri in self.names or uri not in self.spread.datasets:
            return
        manifest = self.contents.datasets[uri]
        sources = [source for source in manifest["inputs"]["source"] if source != self.source]
        for images in self.spread.images:
            if any(f"{source}/".startswith(f"{images}/") for source in sources):
                self.images(images)
        again = {"source": sources, "store": self.contents.store, "name": manifest["name"]}
        words = "nothing is left of its sources; choose others" if not sources else ""
        self._put("DATASET", uri, words or command("ingest", IngestConfig, manifest["settings"], self.names, **again))

    def run(self, uri: str) -> None:
        """Put down how to train a run's model anew; and first its dataset and its parent."""
        told = self.contents.runs[uri].told
        if uri in self.names:
            return
        here = [each for each in self.spread.datasets if each.rsplit("/", 1)[1] == told["dataset_digest"]]
        dataset = here[0] if here else told["dataset"]
        again = {"dataset": dataset, "store": self.contents.store, "name": uri.split("/")[-2]}
        self.dataset(dataset)
        for parent in self.contents.models_of(told["parent"])[:1]:
            self.model(parent)
            again["parent"] = parent
        self._put("MODEL", uri, command("train", TrainConfig, told["settings"], self.names, **again))

    def model(self, uri: str) -> None:
        """A model is what its run makes; other steps of that run come out of the same command."""
        if uri not in self.spread.models or uri in self.names:
            return
        if run_of(uri) in self.contents.runs:
            self.run(run_of(uri))
            self.names[uri] = self.names[run_of(uri)]
        else:
            self._put("MODEL", uri, "of no run that is known here: train it anew as it was trained")

    def images(self, uri: str) -> None:
        """Put down how to make an image set anew; and first its model."""
        if uri in self.names:
            return
        manifest = self.contents.images[uri]
        model = self.contents.models_of(manifest["model"]["digest"])[0]
        self.model(model)
        again = {"model": model, "store": self.contents.store, "name": manifest["name"]}
        if manifest.get("table"):
            again["table"] = manifest["table"]["uri"]
        self._put("IMAGES", uri, command("generate", GenerateConfig, manifest["settings"], self.names, **again))

    def _put(self, kind: str, uri: str, words: str) -> None:
        """Take down a command, or that one which is there already makes this as well."""
        if words in self.made:
            self.lines.append(f"{self.made[words]}  also in place of {uri}")
        else:
            number = 1 + sum(name.startswith(f"{kind}_") for name in self.made.values())
            self.made[words] = f"{kind}_{number}"
            self.lines += ["", f"{self.made[words]}  in place of {uri}", f"  {words}"]
        self.names[uri] = self.made[words]


def run(config: ForgetConfig) -> None:
    """Print the plan; nothing is changed. Raises PipelineError where the source is in no dataset of the store."""
    contents = read_contents(config.store)
    spread = spread_of(contents, config.uri)
    if not spread:
        raise PipelineError(f"{config.uri}: no dataset of {config.store} was read from it; nothing to forget")
    print_line("\n".join(_plan(contents, spread, config.uri)))


def _plan(contents: Contents, spread: Spread, source: str) -> Iterator[str]:
    """The plan, line by line."""
    yield (
        f"{source} went into {len(spread.datasets)} datasets, {len(spread.runs)} runs with {len(spread.models)} "
        f"models, and {len(spread.images)} image sets; nothing is changed by this command"
    )
    yield ""
    yield from _first(spread, source)
    steps = _Steps(contents, spread, source)
    for uri in spread.datasets:
        steps.dataset(uri)
    for uri in spread.runs:
        steps.run(uri)
    for uri in spread.images:
        steps.images(uri)
    yield from steps.lines
    yield from _promotions(contents, steps)
    yield ""
    yield "last, delete what it had a part in:"
    yield from (f"  {uri}" for uri in [*spread.evaluations, *spread.images, *spread.runs, *spread.datasets])


def _first(spread: Spread, source: str) -> Iterator[str]:
    """How to take the source out of where it lies."""
    shard, mark, name = source.rpartition("#")
    yield f"first, {f'write {shard} anew without {name}' if mark else f'delete {source}, or move it away'};"
    yield "  a table that names it must lose that row"
    yield from (f"  {uri} has of it: {part}" for uri, part in spread.datasets.items())
    yield "then, in this order (each command prints last what stands for its name below):"


def _promotions(contents: Contents, steps: _Steps) -> Iterator[str]:
    """What to promote in place of what is live, and what no roll-back may go to any more."""
    affected = {contents.digests[uri] for uri in steps.spread.models}
    for name, head in contents.live().items():
        if head["model"]["digest"] in affected:
            model = contents.models_of(head["model"]["digest"])[0]
            steps.model(model)
            place = ["--store", contents.store, "--name", name]
            yield ""
            yield f"promotion {head['number']} of {name} is live with {model}"
            yield f"  {_evaluate(steps, model, head, name)}"
            yield f"  {_words('promote', '--model', steps.names[model], *place)}"
    for name, entries in contents.promotions.items():
        promoted = {entry["model"]["digest"]: entry["model"]["uri"] for entry in entries if entry["model"]}
        for digest, uri in promoted.items():
            if digest in affected and digest not in entries[-1]["retired"]:
                place = ["--store", contents.store, "--name", name]
                yield f"  {_words('retire', '--model', uri, *place, '--reason', f'made of {steps.source}')}"


def _evaluate(steps: _Steps, model: str, head: Entry, name: str) -> str:
    """The command that judges the new model as the live one was judged."""
    kept, dataset = head["evaluation"], steps.contents.dataset_of(model)
    settings = {key: value for key, value in (kept or {"settings": {}})["settings"].items() if key != "name"}
    place = {"model": model, "dataset": dataset.uri if dataset else "DATASET", "store": steps.contents.store}
    return command("evaluate", EvaluateConfig, settings, steps.names, **place, name=name)


def _words(*words: str) -> str:
    return shlex.join(["python", "-m", "pipelines", *words])
