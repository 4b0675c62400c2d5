"""The gate before promotion: rules such as `frechet <= live + interval`, judged by the figures of evaluations.

A figure is a number, or {"value", "low", "high", "count"} with its 95 % interval. `interval` in a rule is the larger of
the two sides of that interval, and the larger of the candidate's and the live model's.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipelines import storage
from pipelines.config import RULE, PipelineError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt,
}  # fmt: skip
_SHOWN = 3


class GateError(PipelineError):
    """Rules that cannot be judged: a figure is missing, or two evaluations are not comparable."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: its figures, and what they depend on beside the model."""

    uri: str
    figures: dict[str, Any]
    settings: dict[str, Any]
    dataset: str | None


class Figure(NamedTuple):
    """A figure and how far its 95 % interval reaches; 0 where none was recorded."""

    value: float
    interval: float


class Verdict(NamedTuple):
    """What became of a rule: whether it is met, and how that was found in words."""

    rule: str
    passed: bool
    told: str


def open_evaluation(uri: str) -> tuple[Evaluation, str | None]:
    """The evaluation at `uri`, and the digest of the model that it judges. Raises StorageError where there is none.

    Its manifest holds `"model": {"uri", "digest"}`, `"dataset": {"uri", "digest"}`, `"settings"` and `"figures"`. An
    evaluation of before that names no model: its digest is None.
    """
    manifest = storage.read_manifest(uri, "evaluation")
    dataset, model = manifest.get("dataset", {}), manifest.get("model", {})
    return Evaluation(uri, manifest["figures"], manifest["settings"], dataset.get("digest")), model.get("digest")


def needs_live(rules: Sequence[str]) -> bool:
    """Whether one of the rules compares with the live model."""
    return any(_parts(rule)["number"] is None for rule in rules)


def judge(rules: Sequence[str], candidate: Evaluation, live: Evaluation | None) -> list[Verdict]:
    """What becomes of every rule; `live` is None where nothing is live, which every comparison with it passes.

    Raises GateError where a figure is missing that a rule needs, or the two evaluations are not comparable.
    """
    if live is not None and needs_live(rules):
        _check_comparable(candidate, live)
    return [_verdict(rule, candidate, live) for rule in rules]


def comparable(one: Evaluation, other: Evaluation) -> bool:
    """Whether two evaluations were made alike: with the same settings and on the same dataset."""
    return not _differences(one, other)


def figure(evaluation: Evaluation, path: str) -> Figure | None:
    """The figure at a dotted path; None where there is none. Raises GateError where something else stands there."""
    found: Any = evaluation.figures
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if isinstance(found, dict) and _is_number(found.get("value")):
        value = float(found["value"])
        ends = [float(found[side]) for side in ("low", "high") if _is_number(found.get(side))]
        return Figure(value, max((abs(end - value) for end in ends), default=0.0))
    if found is None:
        return None
    if not _is_number(found):
        raise GateError(
            f"{evaluation.uri}: {path} is {str(found)[:60]}; a rule needs a number or a value with its interval there"
        )
    return Figure(float(found), 0.0)


def _verdict(rule: str, candidate: Evaluation, live: Evaluation | None) -> Verdict:
    """One rule judged."""
    parts = _parts(rule)
    ours = figure(candidate, parts["figure"])
    if ours is None:
        if parts["optional"]:
            return Verdict(rule, True, f"{rule}: does not apply, there is no such figure")
        raise GateError(
            f"{candidate.uri}: no figure {parts['figure']}, which the rule '{rule}' needs; there are "
            f"{', '.join(sorted(candidate.figures)) or 'none'}; evaluate again, or write '?{rule}' to apply it only "
            "where there is one"
        )
    if parts["number"] is not None:
        return _compared(rule, parts, ours, float(parts["number"]), parts["number"])
    if live is None:
        return Verdict(rule, True, f"{rule}: passes with {ours.value:.6g}, for nothing is live to compare with")
    theirs = figure(live, parts["figure"])
    if theirs is None and parts["optional"]:
        return Verdict(rule, True, f"{rule}: does not apply, the live model has no such figure")
    if theirs is None:
        raise GateError(f"{live.uri}: the live model has no figure {parts['figure']}, which the rule '{rule}' needs")
    interval = max(ours.interval, theirs.interval)
    sign = {"+": 1, "-": -1, None: 0}[parts["sign"]]
    told = f"live {theirs.value:.6g}" + (f" {parts['sign']} {interval:.6g}" if sign else "")
    return _compared(rule, parts, ours, theirs.value + sign * interval, told)


def _compared(rule: str, parts: dict[str, Any], ours: Figure, bound: float, told: str) -> Verdict:
    passed = _OPERATORS[parts["operator"]](ours.value, bound)
    word = "passes" if passed else "fails"
    return Verdict(rule, passed, f"{rule}: {word} with {ours.value:.6g} against {told}")


def _check_comparable(candidate: Evaluation, live: Evaluation) -> None:
    """Raise GateError where figures would differ for another reason than the model."""
    differences = _differences(candidate, live)
    if differences:
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise GateError(
            f"{candidate.uri}: cannot be compared with the live model's evaluation {live.uri}: "
            f"{'; '.join(differences[:_SHOWN])}{more}; evaluate both models with the same settings"
        )


def _differences(one: Evaluation, other: Evaluation) -> list[str]:
    """What two evaluations were made differently with."""
    ours, theirs = {**one.settings, "dataset": one.dataset}, {**other.settings, "dataset": other.dataset}
    return [
        f"{name} {ours.get(name)} here, {theirs.get(name)} there"
        for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)
    ]  # fmt: skip


def _parts(rule: str) -> dict[str, Any]:
    """A rule taken apart. Raises PipelineError where it is none; settings have checked it before."""
    match = RULE.fullmatch(rule)
    if match is None:
        raise PipelineError(f"rule '{rule}': need FIGURE OP VALUE")
    return match.groupdict()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
