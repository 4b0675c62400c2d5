import dataclasses

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

from diffusion_core.config import PRESETS, ModelConfig, Timesteps
from diffusion_core.names import (
    config_from_diffusers,
    diffusers_config,
    diffusers_scheduler,
    from_diffusers,
    schedule_from_diffusers,
    to_diffusers,
)
from diffusion_core.unet import UNet

PLAIN, ATTENDS = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")


def shape(widths, attention, **settings):
    """UNet2DModel's arguments with attention at the levels listed."""
    kinds = [ATTENDS if level in attention else PLAIN for level in range(len(widths))]
    return {
        "sample_size": 16,
        "block_out_channels": widths,
        "down_block_types": tuple(down for down, _ in kinds),
        "up_block_types": tuple(up for _, up in reversed(kinds)),
        **settings,
    }


GOOGLE = {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6}
CONFIGURATIONS = [
    shape((32, 64), (1,)),
    shape((32, 32, 64), (1, 2), layers_per_block=1, num_class_embeds=5),
    shape((32, 64), (0, 1), resnet_time_scale_shift="scale_shift", attention_head_dim=16),
    shape((32, 64), (1,), resnet_time_scale_shift="scale_shift", attn_norm_num_groups=32, layers_per_block=3),
    shape((16, 32, 32), (2,), norm_num_groups=16, attention_head_dim=None, **GOOGLE),
    shape((32, 64), (), add_attention=False, in_channels=1, out_channels=1),
]


def theirs(settings):
    torch.manual_seed(0)
    made = UNet2DModel(**settings).eval()
    for parameter in made.parameters():  # norms that are one and biases that are zero would hide a mix-up
        nn.init.normal_(parameter, std=0.1)
    return made


@torch.no_grad()
@pytest.mark.parametrize("settings", CONFIGURATIONS, ids=range(len(CONFIGURATIONS)))
def test_a_random_unet2dmodel_loads_into_ours_and_back(settings):
    model = theirs(settings)
    config = config_from_diffusers(dict(model.config))
    ours = UNet(config).eval()
    ours.load_state_dict(from_diffusers(config, model.state_dict()))
    x, t = torch.randn(3, config.channels, 16, 16), torch.tensor([0.0, 10.5, 999.0])
    label = torch.tensor([0, 1, config.classes]) if config.classes else None
    expected = model(x, t, label).sample
    assert float((ours(x, t, label) - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    back = UNet2DModel(**diffusers_config(config)).eval()
    back.load_state_dict(to_diffusers(config, ours.state_dict()))
    assert torch.equal(back(x, t, label).sample, expected)
    assert config_from_diffusers(dict(back.config)) == config


def test_a_file_of_settings_is_read_with_its_private_keys_and_lists():
    settings = {**shape([32, 64], [1]), "_class_name": "UNet2DModel", "_diffusers_version": "0.42.1"}
    del settings["sample_size"]
    config = config_from_diffusers(settings, resolution=16)
    assert (config.resolution, config.widths, config.attention) == (16, (32, 64), (1,))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type: 'fourier' has no counterpart"),
        ({"act_fn": "gelu"}, "act_fn: 'gelu'"),
        ({"downsample_type": "resnet"}, "downsample_type: 'resnet'"),
        ({"out_channels": 6}, "out_channels: "),
        ({"sample_size": (16, 8)}, "sample_size: "),
        ({"sample_size": None}, "sample_size: None"),
        ({"down_block_types": ("SkipDownBlock2D", "DownBlock2D")}, "down_block_types, up_block_types: "),
        ({"attn_norm_num_groups": 8}, "attn_norm_num_groups: 8"),
        ({"colour": 1}, "colour: unknown to UNet2DModel"),
    ],
)
def test_a_network_without_a_counterpart_is_refused_by_the_setting(change, told):
    with pytest.raises(ValueError, match=told):
        config_from_diffusers({**shape((32, 64), (1,)), **change})


def test_what_diffusers_cannot_express_is_not_exported():
    config = dataclasses.replace(PRESETS["tiny"], embedding="timestep")
    assert diffusers_config(config)["sample_size"] == 8
    with pytest.raises(ValueError, match="embedding: log_sigma"):
        diffusers_config(PRESETS["tiny"])
    with pytest.raises(ValueError, match="middle_norm: off"):
        diffusers_config(dataclasses.replace(config, middle_norm=False, scale_shift=False))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(
    "timesteps", [Timesteps(), Timesteps("cosine", 400), Timesteps("scaled_linear", 1000, 0.00085, 0.012)]
)
def test_a_models_schedule_goes_through_a_scheduler_of_diffusers_and_back(prediction, timesteps):
    model = ModelConfig(dataclasses.replace(PRESETS["tiny"], embedding="timestep"), prediction, timesteps=timesteps)
    scheduler = DDPMScheduler(**diffusers_scheduler(model))
    assert schedule_from_diffusers(dict(scheduler.config)) == (prediction, timesteps)


def test_a_tensor_that_does_not_belong_is_refused_by_its_name():
    config = dataclasses.replace(PRESETS["tiny"], embedding="timestep")
    tensors = UNet(config).state_dict()
    with pytest.raises(ValueError, match=r"extra\.weight: no such tensor in a UNet of this shape"):
        to_diffusers(config, {**tensors, "extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"embed\.inner\.weight: no such tensor in a UNet2DModel"):
        from_diffusers(config, tensors)
