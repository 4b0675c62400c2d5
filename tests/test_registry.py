import getpass
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from support.models import SETTINGS, evaluate, figure, make_older, publish

from pipelines import registry, storage
from pipelines.config import (
    EvaluateConfig,
    ModelsConfig,
    PipelineError,
    PromoteConfig,
    RetireConfig,
    RollbackConfig,
    Who,
    parse,
)
from pipelines.gate import Evaluation, GateError, judge
from pipelines.model import model_digest

pytestmark = pytest.mark.usefixtures("one_thread")
GOOD = {"frechet": figure(10.0, 1.0), "memorisation": 0.01}


def evaluation(settings=SETTINGS, dataset="0", **figures):
    return Evaluation("/evaluations/e", figures, settings, dataset)


def good_model(store, number, **figures):
    """A model that passes the default rules where nothing better is live."""
    uri = publish(store, number)
    evaluate(store, uri, {**GOOD, **figures})
    return uri


def promote(uri, **settings):
    registry.promote(PromoteConfig(model=uri, by="ada", **settings))


def live(store):
    found = registry.live_model(str(store), "tiny")
    return found and (found.number, found.uri)


def entries(store):
    return registry.read_log(str(store), "tiny").entries


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        ("frechet <= 12", True),
        ("frechet < 12", False),
        ("frechet >= 12.0", True),
        ("frechet > 1.2e1", False),
        ("frechet <= live", False),
        ("frechet <= live + interval", True),  # 12 against 10 + max(1, 2)
        ("frechet<live+interval", False),  # 12 against 10 + 2 is no less
        ("recall >= live - interval", True),  # 0.5 against 0.6 - 0.1
        ("recall >= live", False),
        ("inpainting.known_bytes_changed <= 0", True),
        ("frechet.high <= 14", True),
        ("?class_accuracy >= 0.5", True),
        ("?recall >= 0.9", False),
        ("plain <= live + interval", False),  # a figure without an interval gives none
        ("lopsided <= live + interval", True),  # 3 against 1 + 2: the longer side counts
    ],
)
def test_a_rule_is_met_by_the_figure_of_the_candidate(rule, passes):
    ours = evaluation(
        frechet=figure(12.0, 2.0), recall=figure(0.5, 0.1), plain=2.0,
        inpainting={"known_bytes_changed": 0}, lopsided={"value": 3.0, "low": 1.0, "high": 3.5, "count": 2},
    )  # fmt: skip
    theirs = evaluation(frechet=figure(10.0, 1.0), recall=figure(0.6, 0.05), plain=1.0, lopsided=1.0)
    if "interval" in rule and rule.startswith("frechet <="):
        assert "with 12 against live 10 + 2" in judge([rule], ours, theirs)[0].told
    assert [verdict.passed for verdict in judge([rule], ours, theirs)] == [passes]


@pytest.mark.parametrize(
    "rule", ["frechet", "frechet = 3", "frechet <= three", "frechet <= live * 2", "3 <= frechet", "a <= live + 0.1", ""]
)
def test_what_is_no_rule_is_refused_in_one_line_that_names_the_flag(rule):
    with pytest.raises(PipelineError, match=r"--rule.*: .*need FIGURE OP VALUE") as raised:
        parse(PromoteConfig, "promote", ["--model", "/m", "--rule", rule])
    assert "\n" not in str(raised.value)


def test_a_figure_that_is_not_there_is_an_error_that_lists_those_that_are():
    with pytest.raises(GateError, match=r"no figure recall, .* there are frechet, kernel; .* '\?recall > 0'"):
        judge(["recall > 0"], evaluation(kernel=1.0, frechet=2.0), None)
    with pytest.raises(GateError, match="kernel is many"):
        judge(["kernel < 1"], evaluation(kernel="many"), None)
    with pytest.raises(GateError, match="the live model has no figure kernel"):
        judge(["kernel <= live"], evaluation(kernel=1.0), evaluation())


def test_evaluations_that_were_made_otherwise_are_not_compared():
    ours = evaluation({**SETTINGS, "samples": 500}, frechet=1.0)
    with pytest.raises(GateError, match="samples 500 here, 64 there; evaluate both models with the same settings"):
        judge(["frechet <= live"], ours, evaluation(frechet=9.0))
    with pytest.raises(GateError, match="dataset 0 here, 1 there"):
        judge(["frechet <= live"], evaluation(frechet=1.0), evaluation(dataset="1", frechet=9.0))
    assert judge(["frechet <= 2"], ours, evaluation(frechet=9.0))[0].passed, "nothing is compared"


def test_the_first_promotion_is_live_and_says_where_the_model_comes_from(store, capsys):
    uri = good_model(store, 1)
    assert live(store) is None
    registry.promote(PromoteConfig(model=uri, reason="the first"))
    assert live(store) == (1, uri)
    assert "passes with 10, for nothing is live to compare with" in capsys.readouterr().out
    (entry,) = entries(store)
    assert entry["model"] == {"uri": uri, "digest": model_digest(storage.read_manifest(uri, "model"))}
    assert (entry["by"], entry["reason"], entry["forced"]) == (getpass.getuser(), "the first", False)
    assert entry["evaluation"]["figures"] == GOOD
    assert entry["lineage"]["settings"]["seed"] == 1
    assert entry["gate"]["passed"]
    assert len(entry["gate"]["rules"]) == 3
    assert entry["time"].startswith("20")


def test_a_model_that_fails_a_rule_is_refused_with_the_figures(tmp_path):
    promote(good_model(tmp_path, 1))
    worse = good_model(tmp_path, 2, frechet=figure(12.5, 2.0), memorisation=0.2)
    with pytest.raises(
        PipelineError, match=r"2 of 3 rules: frechet .* fails with 12.5 against live 10 \+ 2; memor.* 0.2"
    ):
        promote(worse)
    assert live(tmp_path)[0] == 1
    promote(worse, rule=["frechet <= 13"])
    assert live(tmp_path) == (2, worse)


def test_force_says_who_why_and_what_was_passed_over(tmp_path):
    promote(good_model(tmp_path, 1))
    worse = good_model(tmp_path, 2, memorisation=0.2)
    flags = ["--model", worse, "--force"]
    with pytest.raises(PipelineError, match="--force needs --reason"):
        parse(PromoteConfig, "promote", flags)
    registry.promote(parse(PromoteConfig, "promote", [*flags, "--reason", "a demo", "--by", "bob"]))
    entry = entries(tmp_path)[-1]
    assert (entry["by"], entry["reason"], entry["forced"], entry["gate"]["passed"]) == ("bob", "a demo", True, False)
    assert "memorisation <= 0.1: fails with 0.2" in entry["gate"]["problem"]


def test_without_an_evaluation_the_command_that_makes_one_is_told(tmp_path):
    uri = publish(tmp_path, 1)
    with pytest.raises(PipelineError, match="no evaluation of it in") as raised:
        promote(uri)
    words = shlex.split(str(raised.value).split("; run ")[1].split(";")[0])
    config = parse(EvaluateConfig, "evaluate", words[4:])
    assert (config.model, config.store, config.name) == (uri, str(tmp_path), "tiny")
    other = evaluate(tmp_path, publish(tmp_path, 2), GOOD)
    with pytest.raises(PipelineError, match="judges the model"):
        promote(uri, evaluation=other)
    promote(uri, force=True, reason="no time")
    assert "no evaluation of it" in entries(tmp_path)[0]["gate"]["problem"]


def test_the_newest_evaluation_judges_unless_another_is_named(tmp_path):
    uri = publish(tmp_path, 1)
    first = evaluate(tmp_path, uri, {"frechet": 1.0})
    evaluate(tmp_path, uri, {"frechet": 5.0})
    make_older(first, 60)
    with pytest.raises(PipelineError, match="fails with 5 against 2"):
        promote(uri, rule=["frechet <= 2"])
    promote(uri, rule=["frechet <= 2"], evaluation=first)
    assert entries(tmp_path)[0]["evaluation"]["uri"] == first


def test_a_live_model_that_was_evaluated_again_is_compared_by_what_was_made_alike(tmp_path):
    first, second = good_model(tmp_path, 1), publish(tmp_path, 2)
    promote(first)
    more = {**SETTINGS, "samples": 500}
    evaluate(tmp_path, second, {**GOOD, "frechet": figure(8.0, 0.1)}, settings=more)
    with pytest.raises(PipelineError, match="samples 500 here, 64 there"):
        promote(second)
    evaluate(tmp_path, first, {**GOOD, "frechet": figure(7.0, 0.1)}, settings=more)
    with pytest.raises(PipelineError, match=r"fails with 8 against live 7 \+ 0\.1"):
        promote(second)


def test_of_two_that_race_one_wins_and_the_other_is_told(store):
    models = [publish(store, number) for number in range(4)]
    logs = [registry.read_log(store, "tiny")] * 4  # all have seen the same
    barrier = Barrier(4)

    def race(number):
        model = {"uri": models[number], "digest": str(number)}
        barrier.wait()
        try:
            return logs[number].append("promote", model, Who(by=f"racer {number}"), model=model)
        except PipelineError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(race, range(4)))
    won = [number for number, end in enumerate(ends) if isinstance(end, dict)]
    assert len(won) == 1
    assert live(store) == (1, models[won[0]])
    for told in (end for end in ends if isinstance(end, str)):
        assert f"racer {won[0]} did promote {models[won[0]]} as entry 1" in told


def test_rolling_back_goes_to_what_was_live_before_and_further_when_repeated(tmp_path, capsys):
    one, two, three = (good_model(tmp_path, number) for number in (1, 2, 3))
    place = {"store": str(tmp_path), "name": "tiny", "by": "ada"}
    with pytest.raises(PipelineError, match="nothing was live before"):
        registry.roll_back(RollbackConfig(**place))
    for uri in (one, two, three):
        promote(uri)
    registry.roll_back(RollbackConfig(**place, reason="it draws dogs"))
    assert live(tmp_path) == (4, two)
    registry.roll_back(RollbackConfig(**place))
    assert live(tmp_path) == (5, one)
    with pytest.raises(PipelineError, match="nothing was live before"):
        registry.roll_back(RollbackConfig(**place))
    registry.roll_back(RollbackConfig(**place, to=3))
    assert live(tmp_path) == (6, three)
    with pytest.raises(PipelineError, match=r"no promotion 9 .* there are 1 to 6"):
        registry.roll_back(RollbackConfig(**place, to=9))
    log = entries(tmp_path)
    assert [entry["model"]["uri"] for entry in log] == [one, two, three, two, one, three], "history stays"
    assert log[3]["evaluation"] == log[1]["evaluation"]
    assert log[3]["reason"] == "it draws dogs"


def test_a_retired_model_is_not_promoted_nor_rolled_back_to(tmp_path, capsys):
    one, two, three = (good_model(tmp_path, number) for number in (1, 2, 3))
    for uri in (one, two, three):
        promote(uri)
    with pytest.raises(PipelineError, match="live by promotion 3 of tiny; promote another model or roll back"):
        registry.retire(RetireConfig(model=three))
    registry.retire(RetireConfig(model=two, by="ada", reason="it draws dogs"))
    assert live(tmp_path) == (4, three), "what was live stays so"
    with pytest.raises(PipelineError, match=r"is retired .by ada on .*: it draws dogs.; take the mark away with"):
        promote(two)
    registry.roll_back(RollbackConfig(store=str(tmp_path), name="tiny"))
    assert live(tmp_path)[1] == one
    registry.show(ModelsConfig(store=str(tmp_path), name="tiny"))
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{2:016x}"))
    assert row.endswith("retired")
    registry.retire(RetireConfig(model=two, undo=True))
    promote(two)
    assert live(tmp_path)[1] == two
    registry.retire(RetireConfig(model=three))
    promote(three, force=True, reason="it was right")
    assert entries(tmp_path)[-1]["forced"]
    assert not registry.read_log(str(tmp_path), "tiny").is_retired(entries(tmp_path)[-1]["model"]["digest"])


def test_what_is_live_already_is_not_promoted_twice(tmp_path, capsys):
    uri = good_model(tmp_path, 1)
    promote(uri)
    promote(uri)
    assert "is live already, by promotion 1" in capsys.readouterr().out
    assert len(entries(tmp_path)) == 1


def test_the_service_takes_what_is_live_else_the_newest_that_is_not_retired(tmp_path):
    old, new = publish(tmp_path, 1, age=60), publish(tmp_path, 2)
    assert registry.default_model(str(tmp_path), "tiny") == new
    registry.retire(RetireConfig(model=new))
    assert registry.default_model(str(tmp_path), "tiny") == old
    registry.retire(RetireConfig(model=old))
    with pytest.raises(PipelineError, match="no published model here"):
        registry.default_model(str(tmp_path), "tiny")
    registry.retire(RetireConfig(model=old, undo=True))
    evaluate(tmp_path, old, GOOD)
    promote(old)
    publish(tmp_path, 3)
    assert registry.default_model(str(tmp_path), "tiny") == old


def test_the_list_shows_steps_loss_promotions_and_what_is_live(tmp_path, capsys):
    one, two = good_model(tmp_path, 1), good_model(tmp_path, 2)
    promote(one)
    promote(two)
    registry.show(ModelsConfig(store=str(tmp_path), name="tiny"))
    told = capsys.readouterr().out
    assert f"2 models of tiny in {tmp_path}; {two} is live by entry 2" in told
    (row,) = (line.split() for line in told.splitlines() if line.startswith(f"{2:016x}/step-0000003  live"))
    assert row[1:5] == ["live", "2", "3", "0.5200"]
    registry.show(ModelsConfig(model=one))
    whole = capsys.readouterr().out
    assert '"by": "ada"' in whole
    assert '"heldout_loss": 0.51' in whole


def test_a_folder_outside_of_a_store_needs_to_be_told_where_it_belongs(tmp_path):
    uri = good_model(tmp_path / "store", 1)
    shutil.copytree(uri, tmp_path / "copy")
    with pytest.raises(PipelineError, match=r"lies in no store .* give --store and --name"):
        promote(str(tmp_path / "copy"))
    promote(str(tmp_path / "copy"), store=str(tmp_path / "store"), name="tiny")
    assert live(tmp_path / "store") == (1, str(tmp_path / "copy"))
