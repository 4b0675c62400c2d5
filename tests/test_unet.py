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
        ({"widths": (16, 20)}, "widths: 20 is not a multiple of groups=8"),
        ({"attention": (5,)}, "attention: level 5 does not exist"),
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
