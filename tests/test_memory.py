import dataclasses
import importlib.util

import pytest
import torch
from conftest import ROOT

from diffusion_core.config import PRESETS, ModelConfig
from diffusion_core.ema import Profile
from diffusion_core.memory import _trace, largest_micro_batch, levers, memory_of, predict
from diffusion_core.strategies import Ranks
from diffusion_core.training import Optimisation
from diffusion_core.unet import UNet
from pipelines import __main__ as stages
from pipelines.config import PipelineError, PlanConfig, parse

MODEL = ModelConfig(PRESETS["tiny"])
SETTINGS = Optimisation(
    steps=9, learning_rate=1e-3, warmup=0, clip=1.0, weight_decay=0.0, label_dropout=0.1,
    ema=(Profile("power", 0.1), Profile("power", 0.05)), seed=3, global_batch_size=16,
)  # fmt: skip
ALONE, TWO = Ranks(), Ranks(0, 2, 2)
WEIGHTS = sum(4 * parameter.numel() for parameter in UNet(MODEL.unet).parameters())


def needs(strategy="ddp", ranks=ALONE, share=8, micro_batch=8, checkpointing=False, **settings):
    return predict(MODEL, dataclasses.replace(SETTINGS, **settings), strategy, ranks, share, micro_batch, checkpointing)


def test_weights_optimiser_and_averages_are_what_arithmetic_says():
    found = needs()
    assert (found.parameters, found.optimizer, found.ema) == (WEIGHTS, 2 * WEIGHTS, 2 * WEIGHTS)
    assert needs(ema=SETTINGS.ema[:1]).ema == WEIGHTS
    assert found.total == sum(dataclasses.astuple(found))


def test_gradients_stay_whole_where_turns_are_taken_and_in_the_buckets_of_replicas():
    assert needs(micro_batch=4).gradients == WEIGHTS
    assert needs("ddp", TWO).gradients == WEIGHTS
    assert needs().gradients < WEIGHTS


def test_two_shards_halve_weights_optimiser_and_averages_and_no_activations():
    whole, halved = needs("ddp", TWO), needs("fsdp", TWO)
    for name in ("parameters", "optimizer", "ema"):
        # three output channels are cut into two and one: the last layer is padded
        assert getattr(halved, name) == pytest.approx(getattr(whole, name) / 2, rel=0.01)
    assert halved.activations == pytest.approx(whole.activations, rel=0.05)
    assert halved.gathered > 0 == whole.gathered
    assert dataclasses.astuple(needs("hsdp", Ranks(0, 4, 2)))[:4] == dataclasses.astuple(halved)[:4]
    assert needs("fsdp", Ranks(0, 4, 4)).parameters < needs("hsdp", Ranks(0, 4, 2)).parameters


def test_activations_grow_by_the_picture_and_shrink_with_checkpointing_and_half_as_many_bits():
    eight, sixteen = needs(share=8), needs(share=16, micro_batch=16)
    assert sixteen.activations == pytest.approx(2 * eight.activations, rel=0.02)
    assert needs(share=16, micro_batch=8).activations < 0.6 * sixteen.activations
    assert needs(checkpointing=True).activations < 0.8 * eight.activations
    assert needs(precision="bfloat16").activations < 0.8 * eight.activations


def test_bfloat16_copies_the_matrices_but_not_those_that_travel_so():
    matrices = sum(2 * each.numel() for each in UNet(MODEL.unet).parameters() if each.ndim > 1)
    assert 0.9 * matrices < needs(precision="bfloat16").copies <= WEIGHTS / 2
    assert needs("fsdp", TWO, precision="bfloat16").copies == needs().copies == 0


def test_nothing_is_allocated_for_what_is_planned():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unet = dataclasses.replace(MODEL.unet, resolution=512)
    planned = predict(ModelConfig(unet), SETTINGS, "ddp", ALONE, 64, 64).total
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert planned > 20e9
    assert grown < 0.02 * planned


def test_the_largest_micro_batch_is_the_last_that_fits():
    for strategy, ranks in (("ddp", ALONE), ("fsdp", TWO)):
        for budget in (needs(strategy, ranks, 16, 5).total, needs(strategy, ranks, 16, 16).total):
            fits = largest_micro_batch(MODEL, SETTINGS, strategy, ranks, 16, budget)
            assert needs(strategy, ranks, 16, fits).total <= budget
            assert fits == 16 or needs(strategy, ranks, 16, fits + 1).total > budget


def test_where_not_one_picture_fits_the_error_names_the_settings_that_help_most_first():
    with pytest.raises(ValueError, match="a smaller preset or resolution") as raised:
        largest_micro_batch(MODEL, SETTINGS, "ddp", TWO, 8, 1000)
    text = str(raised.value)
    assert "0.00 GB may be used" in text
    assert "\n" not in text
    effects = levers(MODEL, SETTINGS, "ddp", TWO, 8, False)
    assert set(effects) == {"activation_checkpointing", "precision bfloat16", "strategy fsdp", "fewer ema widths"}
    places = [text.index(name) for name in sorted(effects, key=lambda name: effects[name])]
    assert places == sorted(places)
    assert min(effects, key=lambda name: effects[name]) == "strategy fsdp"


@pytest.mark.parametrize(("ranks", "share", "micro"), [(Ranks(0, 3, 2), 8, 8), (ALONE, 0, 1), (ALONE, 8, 0)])
def test_what_no_step_can_be_is_refused(ranks, share, micro):
    with pytest.raises(ValueError, match=r"need at least 1|do not fill nodes"):
        needs("hsdp", ranks, share, micro)


@pytest.mark.parametrize(
    "case",
    [
        ["cpu-small", 16, 16, False, "float32", 1, "ddp", 1],
        ["cpu-small", 16, 16, True, "float32", 1, "fsdp", 2],
    ],
)
def test_predicted_is_measured_within_a_tenth(case):
    path = ROOT / "benchmarks/memory.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_memory", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    step = benchmark.Case(*case)
    assert benchmark.predicted(step) == pytest.approx(benchmark.measured(step)["bytes"], rel=0.1)


def test_a_rank_has_its_part_of_the_machine():
    assert memory_of(torch.device("cpu"), 4) == memory_of(torch.device("cpu")) // 4 > 2**20


def test_sizes_are_read_and_nonsense_is_refused():
    sizes = {"24GB": 24 * 10**9, "16GiB": 16 * 2**30, "800MB": 8 * 10**8}
    for text, count in sizes.items():
        assert parse(PlanConfig, "plan", ["--gpu-memory", text]).gpu_memory == count
    for flags in (
        ["--gpu-memory", "24 bananas"],
        ["--preset", "hugest"],
        ["--workers", "3", "--workers-per-node", "2"],
    ):
        with pytest.raises(PipelineError):
            parse(PlanConfig, "plan", flags)


def test_the_plan_is_a_table_with_a_recommendation_that_train_takes(capsys):
    flags = ["--preset", "tiny", "--workers", "4", "--workers-per-node", "2", "--global-batch-size", "32"]
    assert stages.main(["plan", *flags, "--gpu-memory", "8MB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny at 8x8, 4 workers, 8 of 32 pictures each; 0.01 GB a worker")
    for strategy in ("ddp", "hsdp", "fsdp"):
        assert sum(line.startswith(f"{strategy}, ") for line in lines) == 8  # in two tables: precisions, checkpointing
    assert lines[2].split()[-4:] == ["1", "2", "4", "8"]
    command = lines[-1].split()
    parsed = parse(stages.STAGES["train"].config, "train", [*command[4:], "--dataset", "x"])
    assert (parsed.preset, parsed.workers, parsed.micro_batch) == ("tiny", 4, "8")


def test_a_plan_for_which_nothing_fits_says_what_to_change(capsys):
    assert stages.main(["plan", "--preset", "tiny", "--gpu-memory", "1MB", "--precision", "float32"]) == 0
    assert "nothing fits; with ddp, float32, checkpointing: micro_batch 1 needs" in capsys.readouterr().out
    assert stages.main(["plan", "--preset", "tiny", "--workers", "9", "--global-batch-size", "8"]) == 1
    assert "raise --global-batch-size or lower --workers" in capsys.readouterr().err


def test_steps_are_traced_once():
    needs()
    before = _trace.cache_info().misses
    needs(micro_batch=2, ema=(), learning_rate=0.5, seed=8)
    assert _trace.cache_info().misses == before
