import dataclasses

import pytest
import torch
from torch import nn

from diffusion_core.config import PRESETS, UNetConfig
from diffusion_core.unet import Attention, UNet

TINY = dataclasses.replace(PRESETS["tiny"], classes=3)


def network(config=TINY, seed=0):
    torch.manual_seed(seed)
    made = UNet(config).eval()
    for parameter in made.parameters():  # outputs that are zero at the start would hide every difference
        nn.init.normal_(parameter, std=0.05)
    return made


def inputs(batch=6, config=TINY):
    x = torch.randn(batch, config.channels, config.resolution, config.resolution)
    return x, torch.linspace(-1, 1, batch), torch.arange(batch) % 3


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"resolution": 16},
        {"widths": (16,), "attention": (0,), "head_channels": 16},
        {"widths": (16, 16, 32), "attention": (0, 2), "head_channels": 16, "blocks": 2},
        {"channels": 1, "classes": 0, "dropout": 0.5},
        {"scale_shift": False, "middle_attention": False, "attention": ()},
        {"head_channels": 0, "middle_norm": False, "downsample_padding": "end"},
        {"embedding": "timestep", "sine_first": True, "frequency_shift": 1.0},
        {"resolution": 256, "widths": (8,) * 6, "attention": (5,), "head_channels": 8},
    ],
)
def test_the_answer_has_the_shape_of_the_picture(change):
    config = dataclasses.replace(TINY, **change)
    x, c_noise, label = inputs(config=config)
    assert network(config)(x, c_noise, label if config.classes else None).shape == x.shape


def test_a_new_network_answers_zero():
    x, c_noise, label = inputs()
    assert (UNet(TINY)(x, c_noise, label) == 0).all()


def test_no_label_is_the_null_class():
    x, c_noise, label = inputs()
    made = network()
    assert torch.equal(made(x, c_noise, None), made(x, c_noise, torch.full_like(label, 3)))
    assert not torch.equal(made(x, c_noise, None), made(x, c_noise, label))


def test_noise_level_and_class_change_the_answer():
    x, c_noise, label = inputs()
    made = network()
    base = made(x, c_noise, label)
    assert not torch.allclose(made(x, c_noise + 0.1, label), base)
    assert not torch.allclose(made(x, c_noise, (label + 1) % 3), base)


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def test_a_picture_has_the_same_bits_beside_any_others():
    made = network().to(memory_format=torch.channels_last)
    x, c_noise, label = inputs(16)
    whole = made(last(x), c_noise, label)
    order = torch.randperm(16)
    assert torch.equal(made(last(x[order]), c_noise[order], label[order]), whole[order])
    assert torch.equal(made(last(x[:4]), c_noise[:4], label[:4]), whole[:4])


@torch.inference_mode()
def test_the_memory_layout_changes_nothing_but_rounding():
    x, c_noise, label = inputs()
    changed = network().to(memory_format=torch.channels_last)(last(x), c_noise, label)
    assert torch.allclose(network()(x, c_noise, label), changed, atol=1e-4)


def test_the_small_preset_has_about_a_million_parameters():
    config = dataclasses.replace(PRESETS["cpu-small"], classes=8)
    count = sum(parameter.numel() for parameter in UNet(config).parameters())
    assert 0.9e6 < count < 1.2e6


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"resolution": 9}, "resolution: 9 cannot be halved 1 times"),
        ({"widths": (16, 20)}, "widths: 20; need even multiples of groups=8"),
        ({"attention": (5,)}, "attention: level 5 does not exist"),
        ({"channels": 0}, "channels: 0; need at least 1"),
        ({"classes": -1}, "classes, head_channels: -1"),
        ({"dropout": 1.0}, "dropout: 1.0"),
        ({"head_channels": 24}, "head_channels: 24 does not divide width 32"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_its_field(change, told):
    with pytest.raises(ValueError, match=told):
        UNetConfig(**{**dataclasses.asdict(TINY), **change})


@pytest.mark.parametrize(
    ("levels", "expected"), [((), [8]), ((0,), [16, 16, 16, 8]), ((0, 1), [16, 8, 8, 8, 8, 16, 16])]
)
def test_attention_works_at_the_levels_listed_and_in_the_middle(levels, expected):
    config = dataclasses.replace(TINY, resolution=16, head_channels=16, attention=levels)
    made, seen = network(config), []
    for module in made.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[-1]))
    made(*inputs(1, config))
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize(
    ("preset", "millions"), [("cpu-small", 1.0), ("ddpm-32", 38.3), ("adm-64", 276), ("adm-256", 283)]
)
def test_presets_have_the_parameters_that_the_docs_name(preset, millions):
    with torch.device("meta"):
        made = UNet(PRESETS[preset])
    assert sum(parameter.numel() for parameter in made.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


def gradients(made, x, c_noise, label):
    made.zero_grad()
    torch.manual_seed(1)
    made(x, c_noise, label).square().mean().backward()
    return [parameter.grad.clone() for parameter in made.parameters()]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(dropout):
    config = dataclasses.replace(TINY, dropout=dropout)
    x, c_noise, label = inputs(config=config)
    plain = network(config).double().train()
    saving = UNet(config, checkpointing=True).double().train()
    saving.load_state_dict(plain.state_dict())
    given = (x.double(), c_noise.double(), label)
    for one, other in zip(gradients(plain, *given), gradients(saving, *given), strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)


def saved_bytes(made, given):
    total = []

    def pack(tensor):
        total.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made(*given)
    return sum(total)


def test_activation_checkpointing_keeps_less_for_the_backward_pass():
    given = inputs()
    assert saved_bytes(UNet(TINY, checkpointing=True), given) < 0.5 * saved_bytes(UNet(TINY), given)


def test_the_memory_layout_changes_no_gradient():
    x, c_noise, label = inputs()
    given = (x.double(), c_noise.double(), label)
    plain = gradients(network().double(), *given)
    changed = gradients(network().double().to(memory_format=torch.channels_last), last(given[0]), *given[1:])
    for one, other in zip(plain, changed, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_network_compiles_without_a_graph_break(checkpointing):
    made = UNet(TINY, checkpointing)
    made.load_state_dict(network().state_dict())
    given = inputs()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for label in (given[2], None):
        assert torch.allclose(compiled(*given[:2], label), made(*given[:2], label), atol=1e-5)


@pytest.mark.parametrize(
    ("x", "label", "told"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), None, "x: torch.uint8 .2, 3, 8, 8.; need a floating type"),
        (torch.zeros(2, 1, 8, 8), None, "x: torch.float32 .2, 1, 8, 8.; need .B, 3, H, W."),
        (torch.zeros(3, 8, 8), None, "x: torch.float32 .3, 8, 8."),
        (torch.zeros(2, 3, 8, 9), None, "need H and W that are multiples of 2"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2), "label: torch.float32"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(3, dtype=torch.int64), "label: torch.int64 .3.; need torch.int64 .2."),
    ],
)
def test_what_is_no_batch_of_pictures_is_refused_by_its_name(x, label, told):
    with pytest.raises(ValueError, match=told):
        network()(x, torch.zeros(2), label)
