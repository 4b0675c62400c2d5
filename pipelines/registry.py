"""Which model of a name is live: a numbered log of promotions, roll-backs and retirements, each with who and why.

The entry with the highest number says what is live and which models are retired. An entry is created only where there
is none of its number, so of two that race one wins and the other is told; nothing is ever changed or taken out.
"""

import datetime
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from pipelines import gate, storage
from pipelines.config import ModelPlace, ModelsConfig, PipelineError, PromoteConfig, RetireConfig, RollbackConfig, Who
from pipelines.gate import Evaluation, GateError
from pipelines.model import model_digest, newest_model, no_model, published_models
from pipelines.progress import aligned, print_line

Entry = dict[str, Any]
_ENTRY = re.compile(r"/(\d{6})\.json$")
_IN_STORE = re.compile(r"(?P<store>.+)/models/(?P<name>[^/]+)/.+")
# What an entry says of the live model; a retirement carries it on as it was.
_OF_LIVE = ("model", "lineage", "evaluation", "gate", "forced", "promoted")
_LOG_HEAD = ["entry", "time", "by", "what", "model", "gate", "reason"]
_NOTHING: Entry = {"number": 0, "retired": [], **dict.fromkeys(_OF_LIVE)}


@dataclass(frozen=True)
class Live:
    """The model that is live, and the number of the entry that says so."""

    number: int
    uri: str
    digest: str


@dataclass(frozen=True)
class Log:
    """All entries of a name in order."""

    store: str
    name: str
    entries: tuple[Entry, ...]

    @property
    def head(self) -> Entry:
        """The entry that counts; one that says nothing where there is none."""
        return self.entries[-1] if self.entries else _NOTHING

    @property
    def live(self) -> Live | None:
        """What is live."""
        return _live(self.head)

    def is_retired(self, digest: str) -> bool:
        """Whether a model is marked as one that must not be promoted."""
        return digest in self.head["retired"]

    def promotions_of(self, digest: str) -> list[int]:
        """Numbers of the entries that made a model live."""
        made = (entry for entry in self.entries if entry["action"] in ("promote", "rollback"))
        return [entry["number"] for entry in made if entry["model"]["digest"] == digest]

    def append(self, action: str, subject: dict[str, str], who: Who, **changes: Any) -> Entry:
        """Create the next entry: what the last one said, with `changes`. Raises PipelineError where another was first.

        `subject` is the model that it is about, which after a retirement is not the live one.
        """
        head = self.head
        entry = {
            **{name: head[name] for name in (*_OF_LIVE, "retired")}, **changes,
            "kind": "promotion", "schema": 1, "number": head["number"] + 1, "action": action, "subject": subject,
            "by": who.author, "reason": who.reason, "time": datetime.datetime.now(datetime.UTC).isoformat(),
        }  # fmt: skip
        uri = _entry_uri(self.store, self.name, entry["number"])
        if storage.create_bytes(uri, storage.to_json(entry)) != "created":
            _lose(self.name, storage.read_json(uri))
        return entry


def read_log(store: str, name: str) -> Log:
    """The log of a name, empty where nothing was ever promoted. Raises StorageError where an entry is missing."""
    store = storage.normalise(store)
    numbers = range(1, max(_numbers(store, name), default=0) + 1)
    return Log(store, name, tuple(storage.read_json(_entry_uri(store, name, number)) for number in numbers))


def live_model(store: str, name: str) -> Live | None:
    """The model of this name that is live in a store; None where none was promoted."""
    store = storage.normalise(store)
    last = max(_numbers(store, name), default=0)
    return _live(storage.read_json(_entry_uri(store, name, last))) if last else None


def default_model(store: str, name: str) -> str:
    """URI of the model to take where none is named: the live one, else the newest that is not retired.

    Raises StorageError where there is none.
    """
    log = read_log(store, name)
    if log.live:
        return log.live.uri
    if not log.entries:
        return newest_model(store, name)
    for uri in reversed(published_models(store, name)):
        if not log.is_retired(model_digest(storage.read_manifest(uri, "model"))):
            return uri
    raise no_model(store, name)


def show(config: ModelsConfig) -> None:
    """Print the models of a name and what became of them, or all that is known of one."""
    if config.model is None:
        print_line("\n".join(_listing(config.store, config.name)))
        return
    match = _IN_STORE.fullmatch(config.model)
    store, name = match.group("store", "name") if match else (config.store, config.name)
    print_line(storage.to_json(_whole(read_log(store, name), config.model)).decode().rstrip())


def promote(config: PromoteConfig) -> Entry:
    """Make a model live where its evaluation passes the rules; returns the entry by which it is.

    Raises PipelineError with the figures where one fails, where none can be judged, or where another won meanwhile.
    """
    log, model, manifest = _open(config)
    if log.live and log.live.digest == model["digest"]:
        print_line(f"promote: {log.live.uri} is live already, by promotion {log.live.number}")
        return log.head
    if log.is_retired(model["digest"]) and not config.force:
        raise PipelineError(
            f"{config.model}: is retired ({_why_retired(log, model['digest'])}); take the mark away with "
            f"python -m pipelines retire --undo --model {shlex.quote(config.model)}, or give --force and --reason"
        )
    evaluation, found = _judge(config, log, model, manifest)
    entry = log.append(
        "promote", model, config, model=model, lineage=_lineage(manifest), evaluation=evaluation, gate=found,
        forced=not found["passed"] or log.is_retired(model["digest"]), promoted=log.head["number"] + 1,
        retired=[digest for digest in log.head["retired"] if digest != model["digest"]],
    )  # fmt: skip
    for verdict in found["rules"]:
        print_line(f"promote: {verdict['told']}")
    told = f", forced ({found['problem'] or 'it was retired'}): {config.reason}" if entry["forced"] else ""
    print_line(f"promote: {config.model} is live by promotion {entry['number']} of {log.name}, by {entry['by']}{told}")
    return entry


def promote_or_tell(config: PromoteConfig) -> dict[str, Any]:
    """Promote where the rules allow; whether the model is live now, and the reasons in words, for a report."""
    try:
        entry = promote(config)
    except GateError as error:
        print_line(f"promote: {error}")
        return {"live": False, "told": str(error), "rules": []}
    rules = [rule["told"] for rule in (entry["gate"] or {}).get("rules", [])]
    _, name = _place(config.model, config.store, config.name)
    return {"live": True, "told": f"live by promotion {entry['number']} of {name}", "rules": rules}


def roll_back(config: RollbackConfig) -> None:
    """Make live again what was live before, by an entry of its own. Raises PipelineError where nothing was."""
    log = read_log(config.store, config.name)
    former = _former(log) if config.to is None else _numbered(log, config.to)
    model = former["model"]
    if log.is_retired(model["digest"]):
        raise PipelineError(
            f"{model['uri']}: live by promotion {former['number']}, but retired since "
            f"({_why_retired(log, model['digest'])}); give --to with another number, or retire --undo first"
        )
    if log.live and log.live.digest == model["digest"]:
        print_line(f"rollback: {model['uri']} is live already, by promotion {log.live.number}")
        return
    if not storage.is_published(model["uri"]):
        raise PipelineError(f"{model['uri']}: no model here any more; roll back further with --to, or train it again")
    changes = {name: former[name] for name in _OF_LIVE}
    entry = log.append("rollback", model, config, **changes)
    told = f"promotion {entry['number']} of {log.name}, back to promotion {former['number']}"
    print_line(f"rollback: {model['uri']} is live by {told}, by {entry['by']}")


def retire(config: RetireConfig) -> None:
    """Mark a model as one that must not be promoted, or take the mark away. Raises PipelineError where it is live."""
    log, model, _ = _open(config)
    marked, digest = log.is_retired(model["digest"]), model["digest"]
    if marked is not config.undo:
        print_line(f"retire: {config.model} is {'retired already' if marked else 'not retired'}")
        return
    if log.live and log.live.digest == digest:
        raise PipelineError(
            f"{config.model}: live by promotion {log.live.number} of {log.name}; promote another model or roll back, "
            "then retire this one"
        )
    retired = [known for known in log.head["retired"] if known != digest] + ([] if config.undo else [digest])
    entry = log.append("unretire" if config.undo else "retire", model, config, retired=retired)
    told = "may be promoted again" if config.undo else "is retired"
    print_line(f"retire: {config.model} {told} (entry {entry['number']} of {log.name}, by {entry['by']})")


def evaluations_of(store: str, name: str, digest: str) -> list[Evaluation]:
    """Evaluations of a model that lie under its name, the newest first."""
    base = storage.join(storage.normalise(store), "evaluations", name)
    folders = [storage.join(base, folder) for folder in storage.list_folders(base)]
    opened = [(uri, *gate.open_evaluation(uri)) for uri in folders if storage.is_published(uri)]
    own = [
        (storage.modified(storage.join(uri, storage.MANIFEST)), uri, each) for uri, each, of in opened if of == digest
    ]
    return [each for _, _, each in sorted(own, key=lambda item: item[:2], reverse=True)]


def _judge(
    config: PromoteConfig, log: Log, model: dict[str, str], manifest: dict[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The evaluation as the entry keeps it, and what the gate says. Raises GateError unless it passes or is forced."""
    evaluation: Evaluation | None = None
    verdicts: list[gate.Verdict] = []
    try:
        evaluation = _evaluation(config, log, model, manifest)
        live = _evaluation_of_live(log, evaluation) if gate.needs_live(config.rule) else None
        verdicts = gate.judge(config.rule, evaluation, live)
        failed = [verdict.told for verdict in verdicts if not verdict.passed]
        problem = f"{len(failed)} of {len(verdicts)} rules: {'; '.join(failed)}" if failed else ""
    except GateError as error:
        problem = str(error)
    if problem and not config.force:
        refused = f"{config.model}: not promoted, refused by {problem}" if verdicts else problem
        raise GateError(f"{refused}; or give --force and --reason")
    found = {"passed": not problem, "problem": problem, "rules": [verdict._asdict() for verdict in verdicts]}
    return (vars(evaluation) if evaluation else None), found


def _evaluation(config: PromoteConfig, log: Log, model: dict[str, str], manifest: dict[str, Any]) -> Evaluation:
    """The evaluation that was named, or the newest of the model. Raises GateError where there is none of this model."""
    if config.evaluation:
        evaluation, judged = gate.open_evaluation(config.evaluation)
        if judged != model["digest"]:
            raise GateError(
                f"{config.evaluation}: judges the model {(judged or 'that it does not name')[:12]} and not "
                f"{model['digest'][:12]} ({config.model}); {_evaluate(log, config.model, manifest['lineage'])}"
            )
        return evaluation
    found = evaluations_of(log.store, log.name, model["digest"])
    if not found:
        base = storage.join(log.store, "evaluations", log.name)
        raise GateError(
            f"{config.model}: no evaluation of it in {base}; {_evaluate(log, config.model, manifest['lineage'])}"
        )
    return found[0]


def _evaluation_of_live(log: Log, candidate: Evaluation) -> Evaluation | None:
    """What the live model is compared by: the evaluation that its promotion keeps, or one made as the candidate's.

    None where nothing is live. Raises GateError where a live model has none.
    """
    if log.live is None:
        return None
    kept = log.head["evaluation"]
    recorded = [Evaluation(**kept)] if kept else []
    likewise = (each for each in recorded if gate.comparable(candidate, each))
    others = (e for e in evaluations_of(log.store, log.name, log.live.digest) if gate.comparable(candidate, e))
    found = next(likewise, None) or next(others, None) or next(iter(recorded), None)
    if found is None:
        lineage = log.head["lineage"] or {}
        raise GateError(
            f"{log.live.uri}: live without an evaluation to compare with; {_evaluate(log, log.live.uri, lineage)} with "
            "the settings of the candidate's"
        )
    return found


def _evaluate(log: Log, model: str, lineage: dict[str, Any]) -> str:
    """The command that evaluates a model, in words."""
    flags = {"model": model, "dataset": lineage.get("dataset", "DATASET"), "store": log.store, "name": log.name}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return f"run {shlex.join(['python', '-m', 'pipelines', 'evaluate', *words])}"


def _open(config: ModelPlace) -> tuple[Log, dict[str, str], dict[str, Any]]:
    """The log that a model belongs to, the model as entries name it, and its manifest."""
    store, name = _place(config.model, config.store, config.name)
    manifest = storage.read_manifest(config.model, "model")
    return read_log(store, name), {"uri": config.model, "digest": model_digest(manifest)}, manifest


def _place(model: str, store: str | None, name: str | None) -> tuple[str, str]:
    """Store and name of a model's promotions: as given, else as its URI says. Raises PipelineError without either."""
    match = _IN_STORE.fullmatch(model)
    if match:
        return store or match["store"], name or match["name"]
    if store and name:
        return store, name
    raise PipelineError(f"{model}: lies in no store (…/models/NAME/…), so give --store and --name as well")


def _former(log: Log) -> Entry:
    """The entry of what was live before the live model was promoted, and was not retired since."""
    number = log.head["promoted"] or 0
    while number > 1:
        entry = log.entries[number - 2]
        if entry["model"] and not log.is_retired(entry["model"]["digest"]):
            return entry
        number = entry["promoted"] or 0
    raise PipelineError(
        f"{log.name}: nothing was live before in {log.store} that is not retired; promote a model, or give --to NUMBER"
    )


def _numbered(log: Log, number: int) -> Entry:
    """The entry of a number, which must have made a model live."""
    if number > len(log.entries) or not log.entries[number - 1]["model"]:
        raise PipelineError(
            f"{log.name}: no promotion {number} in {log.store}; there are 1 to {len(log.entries)}"
            if log.entries
            else f"{log.name}: nothing was promoted yet in {log.store}"
        )
    return log.entries[number - 1]


def _lineage(manifest: dict[str, Any]) -> dict[str, Any]:
    """Where a model comes from: dataset and its sources, settings, code; sources are None where the dataset is gone."""
    told = manifest["lineage"]
    sources = None
    if told.get("dataset") and storage.is_published(told["dataset"]):
        dataset = storage.read_manifest(told["dataset"], "dataset")
        sources = {**dataset["inputs"], "sha256": dataset["sources"]["sha256"]}
    return {**told, "code": manifest["code"], "sources": sources}


def _listing(store: str, name: str) -> list[str]:
    """The table of models and the log, for people."""
    log, models = read_log(store, name), published_models(store, name)
    if not models and not log.entries:
        raise no_model(store, name)
    rows = [["model", "live", "promotions", "steps", "held-out loss", "published", "retired"]]
    rows += [_row(log, uri) for uri in reversed(models)]
    live = f"{log.live.uri} is live by entry {log.live.number}" if log.live else "none is live"
    told = [f"{len(models)} models of {name} in {log.store}; {live}", "", *aligned(rows, left=(0, 1, 2, 5, 6))]
    if log.entries:
        told += [
            "",
            *aligned([_LOG_HEAD, *map(_entry_row, log.entries)], left=range(1, 7)),
        ]
    return told


def _row(log: Log, uri: str) -> list[str]:
    """A model in the table."""
    manifest = storage.read_manifest(uri, "model")
    digest, loss = model_digest(manifest), _heldout_loss(uri)
    when = datetime.datetime.fromtimestamp(storage.modified(storage.join(uri, storage.MANIFEST)), datetime.UTC)
    return [
        _short(uri),
        "live" if log.live and log.live.digest == digest else "",
        ", ".join(map(str, log.promotions_of(digest))),
        str(manifest["lineage"].get("step", "")),
        "" if loss is None else f"{loss:.4f}",
        f"{when:%Y-%m-%d %H:%M}",
        "retired" if log.is_retired(digest) else "",
    ]


def _entry_row(entry: Entry) -> list[str]:
    """An entry of the log in the table."""
    judged = entry["action"] == "promote"
    verdict = ("forced" if entry["forced"] else "passed") if judged else ""
    when = entry["time"][:16].replace("T", " ")
    model = _short(entry["subject"]["uri"])
    return [str(entry["number"]), when, entry["by"], entry["action"], model, verdict, entry["reason"]]


def _whole(log: Log, uri: str) -> dict[str, Any]:
    """All that is known of one model."""
    manifest = storage.read_manifest(uri, "model")
    digest = model_digest(manifest)
    return {
        "uri": uri, "digest": digest, "live": bool(log.live and log.live.digest == digest),
        "retired": log.is_retired(digest), "lineage": _lineage(manifest), "heldout_loss": _heldout_loss(uri),
        "config": storage.read_json(storage.join(uri, "config.json")),
        "entries": [entry for entry in log.entries if entry["subject"]["digest"] == digest],
        "evaluations": [vars(each) for each in evaluations_of(log.store, log.name, digest)],
    }  # fmt: skip


def _heldout_loss(uri: str) -> float | None:
    """The last loss on held-out pictures; None where none was measured, or the model brings no curve."""
    try:
        validation = storage.read_json(storage.join(uri, "curve.json"))["validation"]
    except storage.NotFoundError:
        return None
    return float(validation[-1][1]) if validation else None


def _why_retired(log: Log, digest: str) -> str:
    """Who retired a model, when and why."""
    entries: Iterator[Entry] = (e for e in reversed(log.entries) if e["action"] == "retire")
    entry = next(e for e in entries if e["subject"]["digest"] == digest)
    return f"by {entry['by']} on {entry['time'][:10]}{': ' + entry['reason'] if entry['reason'] else ''}"


def _lose(name: str, entry: Entry) -> NoReturn:
    """Tell the one that came second in a race."""
    raise PipelineError(
        f"{name}: another was first: {entry['by']} did {entry['action']} {entry['subject']['uri']} as entry "
        f"{entry['number']} at {entry['time'][:19]}; look at python -m pipelines models, and run this again "
        "if it still holds"
    )


def _live(entry: Entry) -> Live | None:
    model = entry["model"]
    return Live(entry["number"], model["uri"], model["digest"]) if model else None


def _short(uri: str) -> str:
    """A model's run and step, which tell it apart under its name."""
    parts = uri.split("/")
    return "/".join((parts[-3], parts[-1])) if len(parts) > 3 and parts[-2] == "published" else uri


def _numbers(store: str, name: str) -> list[int]:
    """Numbers of the entries, ascending."""
    found = storage.list_if_any(storage.join(store, "models", name, "promotions"))
    return sorted(int(match[1]) for info in found if (match := _ENTRY.search(info.uri)))


def _entry_uri(store: str, name: str, number: int) -> str:
    return storage.join(store, "models", name, "promotions", f"{number:06}.json")
