import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from support.folders import discrete, export, flip_a_bit, published, shaken

from diffusion_core.config import PRESETS, SamplerConfig, Timesteps
from diffusion_core.engine import Engine
from diffusion_core.noise import normal
from diffusion_core.samplers import make_plan, model_grid, new_state, sample, start_level, step
from diffusion_core.tasks import Request
from diffusion_core.unet import UNet
from pipelines import __main__ as stages
from pipelines import bulk, evaluate, exchange, serve, storage
from pipelines.config import EvaluateConfig, ExportConfig, GenerateConfig, ImportConfig, PipelineError, ServeConfig
from pipelines.dataset import open_dataset
from pipelines.model import load_config, load_model, newest_model
from pipelines.worker import Worker, load_worker

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
SCHEDULES = ["linear", "squaredcos_cap_v2", "scaled_linear"]
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
EXPORTED = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"}


def imported(source, store, **flags):
    return exchange.run(ImportConfig(source=str(source), store=str(store), name="theirs", **flags)).uri


def saved(folder, model, schedule="linear", prediction="epsilon", **settings):
    """A pipeline folder as diffusers writes it, with or without a pipeline's index."""
    model.save_pretrained(folder / "unet")
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type=prediction, **settings)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def noise(count=3, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def ours(uri, start, grid, steps=50, label=None):
    """DDIM with our sampler from the given noise."""
    model = load_model(uri)
    config = SamplerConfig("ddim", steps, grid)
    plan = make_plan(config, model_grid(config, model.config))
    x = start * start_level(plan, model.config)
    return sample(lambda x, sigma: model.denoiser(x, sigma, label), plan, x, torch.arange(len(x)))


@torch.no_grad()
def theirs(model, scheduler, start, steps=50, label=None):
    """DDIM as diffusers' own pipeline loops."""
    scheduler.set_timesteps(steps)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t, label).sample, t, x).prev_sample
    return x


def picture(x):
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def assert_near(found, expected):
    """To 1e-4 of the pictures' range, [-1, 1] or what an untrained network makes of it."""
    assert float((found - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(("prediction", "betas"), [("x0", "linear"), ("v", "cosine")])
def test_an_exported_model_draws_the_same_pictures_in_the_pipelines_of_diffusers(tmp_path, prediction, betas):
    config = discrete(prediction, betas)
    model = published(tmp_path / "model", config, shaken(UNet(config.unet), 0.06).state_dict())
    folder = export(model, tmp_path / "out")
    for kind, steps, drawn in (
        (DDIMPipeline, 50, ours(model, noise(), "leading")),
        (DDPMPipeline, 40, ddpm(model, 40)),
    ):
        assert float((drawn.abs() < 1).float().mean()) > 0.5, "not all is clipped away"
        assert float(drawn.std()) > 0.02
        pipeline = kind.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        shown = pipeline(3, torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np").images
        assert np.abs(shown - picture(drawn)).max() <= 1e-4


@torch.no_grad()
def ddpm(uri, steps):
    """Our DDPM with the noise that diffusers draws, in its order."""
    model, generator = load_model(uri), torch.Generator().manual_seed(0)
    config = SamplerConfig("ddpm", steps, "leading")
    plan = make_plan(config, model_grid(config, model.config))
    start = torch.randn(3, 3, 8, 8, generator=generator)
    state = new_state(start * start_level(plan, model.config), plan.memory)
    for row in range(len(plan)):
        denoised = model.denoiser(state.x, plan.sigma[row].float().expand(3), None)
        z = torch.randn(3, 3, 8, 8, generator=generator) if plan.s[row] != 0 else None
        state = step(state, plan.row(row), denoised, z)
    return state.x


@pytest.mark.parametrize(
    ("prediction", "betas", "classes"),
    [
        ("eps", "linear", ()),
        ("eps", "cosine", ("cat", "dog")),
        ("x0", "scaled_linear", ()),
        ("x0", "linear", ("cat", "dog")),
        ("v", "cosine", ()),
        ("v", "scaled_linear", ("cat", "dog")),
    ],
)
def test_every_model_that_can_be_told_in_diffusers_words_is(tmp_path, prediction, betas, classes):
    config = discrete(prediction, betas, classes)
    model = published(tmp_path / "model", config, shaken(UNet(config.unet)).state_dict())
    folder = export(model, tmp_path / "out")
    network = UNet2DModel.from_pretrained(folder, subfolder="unet")
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert scheduler.config.prediction_type == PREDICTIONS[prediction]
    label = torch.tensor([0, 1, 2]) if classes else None
    expected = theirs(network, scheduler, noise(), label=label)
    assert_near(ours(model, noise(), "leading", label=label), expected)
    assert (Path(folder) / "model_index.json").exists() == (not classes)
    assert (Path(folder) / "class_names.json").exists() == bool(classes)


@pytest.mark.parametrize(
    ("schedule", "prediction", "spacing", "steps"),
    [
        *((schedule, prediction, "leading", 50) for schedule in SCHEDULES for prediction in PREDICTIONS.values()),
        ("linear", "epsilon", "trailing", 50),
        ("squaredcos_cap_v2", "v_prediction", "trailing", 50),
        ("scaled_linear", "sample", "leading", 30),
    ],
)
def test_ddim_from_an_imported_model_is_that_of_diffusers(tmp_path, schedule, prediction, spacing, steps):
    network = shaken(UNet2DModel(**TINY))
    model = imported(saved(tmp_path / "in", network, schedule, prediction), tmp_path / "store")
    scheduler = DDIMScheduler(
        beta_schedule=schedule, prediction_type=prediction, clip_sample=False, timestep_spacing=spacing
    )
    assert_near(ours(model, noise(), spacing, steps), theirs(network, scheduler, noise(), steps))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_engine_draws_what_diffusers_draws_from_the_noise_of_its_seed(tmp_path, schedule):
    network = shaken(UNet2DModel(**TINY))
    model = load_model(imported(saved(tmp_path / "in", network, schedule, "v_prediction"), tmp_path / "store"))
    scheduler = DDIMScheduler(beta_schedule=schedule, prediction_type="v_prediction", clip_sample=False)
    seeds = torch.tensor([3, 4])
    drawn = Engine(model.denoiser).run(
        [Request(int(seed), sampler=SamplerConfig("ddim", 50, "leading")) for seed in seeds]
    )
    assert_near(torch.stack(drawn), theirs(network, scheduler, normal(seeds, "start", 0, (3, 8, 8), torch.float32)))


def test_a_pipeline_of_an_early_version_is_read(tmp_path):
    """All files in one folder, attention under its former names, half precision, a config without newer keys."""
    google = {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "norm_eps": 1e-6}
    network = shaken(UNet2DModel(**TINY, **google, attention_head_dim=None)).half().float()
    saved(tmp_path / "new", network)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in network.state_dict().items():
        for new, old in former.items():
            name = name.replace(new, old) if ".attentions." in name else name
        tensors[name] = value.half()
    (tmp_path / "old").mkdir()
    safetensors.torch.save_file(tensors, tmp_path / "old/diffusion_pytorch_model.safetensors")
    config = json.loads((tmp_path / "new/unet/config.json").read_text())
    kept = {key: config[key] for key in (*TINY, *google, "_class_name", "attention_head_dim", "in_channels")}
    (tmp_path / "old/config.json").write_text(json.dumps(kept))
    betas = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    (tmp_path / "old/scheduler_config.json").write_text(json.dumps({**betas, "clip_sample": True}))
    model = imported(tmp_path / "old", tmp_path / "store")
    x, t = noise(), torch.tensor([0.0, 500.0, 999.0])
    with torch.no_grad():
        assert torch.allclose(load_model(model).denoiser.network(x, t, None), network(x, t).sample, atol=1e-5)
    assert load_config(model).prediction == "eps"


@pytest.mark.parametrize(
    ("flags", "names", "label"),
    [
        ({}, ("0", "1", "2"), [0, 1, 2]),
        ({"class_names": ["cat", "dog", "fox"]}, ("cat", "dog", "fox"), [0, 1, 2]),
        ({"class_names": ["cat", "dog"]}, ("cat", "dog"), [0, 1, None]),
    ],
)
def test_classes_are_named_and_the_last_row_may_mean_none(tmp_path, flags, names, label):
    network = shaken(UNet2DModel(**TINY, num_class_embeds=3))
    model = imported(saved(tmp_path / "in", network), tmp_path / "store", **flags)
    assert load_config(model).class_names == names
    denoiser, scheduler = load_model(model).denoiser, DDIMScheduler(clip_sample=False)
    rows = torch.tensor([len(names) if each is None else each for each in label])
    expected = theirs(network, scheduler, noise(), 5, torch.arange(3))
    assert_near(ours(model, noise(), "leading", 5, rows), expected)
    if len(names) == 3:
        table = network.class_embedding.weight
        assert torch.allclose(denoiser.network.classes.weight[3], table.mean(dim=0), atol=1e-6)


def test_what_was_exported_comes_back_bit_by_bit(tmp_path):
    config = discrete("v", "cosine", ("cat", "dog"))
    model = published(tmp_path / "model", config, shaken(UNet(config.unet)).state_dict())
    folder = export(model, tmp_path / "out")
    again = imported(folder, tmp_path / "store")
    assert load_config(again).class_names == ("cat", "dog")
    assert load_config(again).unet == config.unet
    one, two = (load_model(uri).denoiser.network.state_dict() for uri in (model, again))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    lineage = storage.read_manifest(again, "model")["lineage"]
    assert (lineage["kind"], lineage["source"]) == ("import", folder)
    assert newest_model(str(tmp_path / "store"), "theirs") == again
    assert f"Imported from: {folder} (digest {lineage['digest']})" in (Path(again) / "README.md").read_text()


def test_folders_and_models_lie_on_disk_or_on_s3(store, tmp_path):
    config = discrete("x0")
    model = published(tmp_path / "model", config, shaken(UNet(config.unet)).state_dict())
    assert exchange.find(ExportConfig(model=model, to=f"{store}/out")) is None
    assert export(model, f"{store}/out") == f"{store}/out"
    assert exchange.find(ExportConfig(model=model, to=f"{store}/out")).found
    again = imported(f"{store}/out", store)
    assert exchange.find(ImportConfig(source=f"{store}/out", store=store, name="theirs")).uri == again
    x = noise()
    one, two = (load_model(uri).denoiser(x, torch.full((3,), 2.0), None) for uri in (model, again))
    assert torch.equal(one, two)


def test_both_stages_find_what_they_made_from_the_command_line(tmp_path, capsys):
    model = published(tmp_path / "model", discrete("eps"), UNet(discrete("eps").unet).state_dict())
    out, store = str(tmp_path / "out"), str(tmp_path / "store")
    for arguments in (["export", "--model", model, "--to", out], ["import", "--from", out, "--store", store]):
        assert stages.main(arguments) == 0
        assert "found" not in capsys.readouterr().out
        assert stages.main(arguments) == 0
        assert f"{arguments[0]}: found" in capsys.readouterr().out
    other = published(tmp_path / "other", discrete("v"), UNet(discrete("v").unet).state_dict())
    assert stages.main(["export", "--model", other, "--to", out]) == 1
    assert f"{out}: holds {model}, another model; give --to an empty folder" in capsys.readouterr().err


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    model = published(tmp_path / "model", discrete("eps"), UNet(discrete("eps").unet).state_dict())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("mine")
    with pytest.raises(PipelineError, match=r"out: has another README\.md; give --to an empty folder"):
        export(model, tmp_path / "out")
    assert (tmp_path / "out/README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prediction": "edm"}, "prediction: edm; diffusers' schedulers know eps, x0, v alone; train with --predi"),
        ({"prediction": "flow"}, "prediction: flow"),
        ({"timesteps": None}, r"timesteps: none; .*; train with --prediction eps --timesteps linear"),
        ({"unet": PRESETS["tiny"]}, "embedding: log_sigma; UNet2DModel embeds timesteps alone; train with"),
    ],
)
def test_what_diffusers_cannot_express_is_refused_with_what_it_could(tmp_path, change, told):
    config = dataclasses.replace(discrete("eps"), **change)
    model = published(tmp_path / "model", config, UNet(config.unet).state_dict())
    with pytest.raises(PipelineError, match=told):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("network", "scheduler", "flags", "told"),
    [
        ({"act_fn": "gelu"}, {}, {}, "act_fn: 'gelu' has no counterpart"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, {}, {}, "down_block_types, up_block_types: "),
        ({"in_channels": 1, "out_channels": 1}, {}, {}, "in_channels: 1; only 3 can be read"),
        ({"_class_name": "UNet2DConditionModel"}, {}, {}, "_class_name: 'UNet2DConditionModel'; only 'UNet2DModel'"),
        ({"layers_per_block": 2}, {}, {}, r"safetensors: .*: missing; its config needs \["),
        ({"sample_size": None}, {}, {}, "sample_size: None; need one number"),
        ({"sample_size": 7}, {}, {}, "resolution: 7 cannot be halved"),
        ({}, {}, {"resolution": 16}, "sample_size: 8, but --resolution 16"),
        ({}, {"beta_schedule": "sigmoid"}, {}, "beta_schedule: 'sigmoid' has no counterpart; can read linear, scaled"),
        ({}, {"prediction_type": "flow_prediction"}, {}, "prediction_type: 'flow_prediction' has no counterpart"),
        ({}, {"trained_betas": [0.1, 0.2]}, {}, r"trained_betas: \[0.1, 0.2\] has no counterpart"),
        ({}, {"rescale_betas_zero_snr": True}, {}, "rescale_betas_zero_snr: True has no counterpart"),
        ({}, {}, {"prediction": "v"}, "its scheduler says prediction eps, but --prediction v was given"),
        ({}, {}, {"betas": "cosine"}, "its scheduler says betas linear, but --betas cosine was given"),
        ({}, {}, {"class_names": ["cat"]}, "num_class_embeds: 0, but 1 class names"),
        ({"num_class_embeds": 3}, {}, {"class_names": ["cat"]}, "num_class_embeds: 3, but 1 class names"),
        ({"num_class_embeds": 2}, {}, {"class_names": ["a", "a"]}, "class names: a, a; need different ones"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_its_key(tmp_path, network, scheduler, flags, told):
    folder = saved(tmp_path / "in", UNet2DModel(**TINY))
    for name, change in (("unet/config.json", network), ("scheduler/scheduler_config.json", scheduler)):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, **change}))
    with pytest.raises(PipelineError, match=told) as raised:
        imported(folder, tmp_path / "store", **flags)
    assert str(folder) in str(raised.value)
    assert not (tmp_path / "store").exists()


def test_a_bare_network_needs_to_be_told_its_schedule(tmp_path):
    UNet2DModel(**TINY).save_pretrained(tmp_path / "in")
    with pytest.raises(PipelineError, match=r"no scheduler_config\.json; give --prediction and --betas"):
        imported(tmp_path / "in", tmp_path / "store")
    told = {"prediction": "v", "betas": "scaled_linear", "timesteps": 500, "beta_last": 0.012}
    config = load_config(imported(tmp_path / "in", tmp_path / "store", **told))
    assert (config.prediction, config.timesteps) == ("v", Timesteps("scaled_linear", 500, 1e-4, 0.012))


def test_a_pickle_is_refused_by_name_with_what_to_do(tmp_path):
    folder = saved(tmp_path / "in", UNet2DModel(**TINY))
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(PipelineError, match=r"diffusion_pytorch_model\.bin: a pickle, .*; where you trust it, load"):
        imported(folder, tmp_path / "store")
    weights.with_suffix(".bin").unlink()
    with pytest.raises(PipelineError, match=r"model\.safetensors: not found; save the model in one file"):
        imported(folder, tmp_path / "store")


@pytest.mark.parametrize("name", sorted(EXPORTED | {"class_names.json"}))
def test_one_changed_byte_of_an_exported_folder_is_noticed_and_named(tmp_path, name):
    config = discrete("v", "cosine", ("cat", "dog"))
    model = published(tmp_path / "model", config, UNet(config.unet).state_dict())
    folder = Path(export(model, tmp_path / "out"))
    flip_a_bit(folder / name)
    with pytest.raises(storage.DamagedError, match=f"{name}: checksum"):
        imported(folder, tmp_path / "store")
    with pytest.raises(storage.DamagedError, match=f"{name}: checksum"):
        exchange.find(ExportConfig(model=model, to=str(folder)))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_one_changed_byte_of_a_model_is_noticed_and_named_by_all_that_load_it(tmp_path, name):
    model = imported(saved(tmp_path / "in", UNet2DModel(**TINY)), tmp_path / "store")
    flip_a_bit(Path(model) / name)
    loads = (
        load_model,
        load_worker,
        lambda uri: export(uri, tmp_path / "out"),
        lambda uri: serve.start(ServeConfig(model=uri)),
        lambda uri: bulk.run(GenerateConfig(model=uri, store=str(tmp_path / "store"), count=2)),
    )
    for load in loads:
        with pytest.raises(storage.DamagedError, match=f"{name}: checksum"):
            load(model)


def test_an_imported_model_generates_in_bulk(tmp_path, tiny_dataset):
    names = list(open_dataset(tiny_dataset).class_names)
    network = shaken(UNet2DModel(**TINY, num_class_embeds=len(names) + 1))
    store = str(tmp_path / "store")
    model = imported(saved(tmp_path / "in", network, prediction="v_prediction"), store, class_names=names)
    place = {"store": store, "name": "theirs", "model": model, "steps": 2}
    images = bulk.run(GenerateConfig(**place, count=4, workers=1))
    assert storage.read_manifest(images.uri, "images")["rows"] == 4


@pytest.mark.parametrize("conditional", [True, False])
def test_an_imported_model_is_evaluated_also_without_the_classes_of_the_dataset(tmp_path, tiny_dataset, conditional):
    names = list(open_dataset(tiny_dataset).class_names)[::-1] if conditional else []
    network = shaken(UNet2DModel(**TINY, **({"num_class_embeds": len(names) + 1} if names else {})))
    store = str(tmp_path / "store")
    model = imported(saved(tmp_path / "in", network, prediction="v_prediction"), store, class_names=names)
    how = {"samples": 8, "steps": 2, "edits": 2, "feature_steps": 4, "curve_samples": 0, "likelihood": 0}
    judged = evaluate.run(EvaluateConfig(store=store, name="theirs", model=model, dataset=tiny_dataset, **how))
    figures = storage.read_manifest(judged.uri, "evaluation")["figures"]
    assert {each["known_bytes_changed"] for each in figures["inpainting"].values()} == {0}
    assert ("class_accuracy" in figures) is ("per_class" in figures) is conditional
    assert np.isfinite(figures["heldout_loss"]["value"])


def test_an_imported_model_samples_and_repaints_like_ours(tmp_path):
    network = shaken(UNet2DModel(**TINY, num_class_embeds=3))
    source = saved(tmp_path / "in", network, "squaredcos_cap_v2", "v_prediction")
    worker = Worker(load_model(imported(source, tmp_path / "store", class_names=["cat", "dog"])), lanes=4, threads=1)
    first = worker.sample("cat", n=2, seed=3, steps=4)
    assert np.array_equal(first[1], worker.sample("cat", n=2, seed=3, steps=4)[1])
    assert not np.array_equal(first[0], worker.sample("dog", seed=3, steps=4)[0])
    mask = Image.new("RGBA", (8, 8), "black")
    mask.paste((0, 0, 0, 0), (0, 0, 4, 8))
    repainted = np.asarray(worker.edit("inpaint", first[0], mask, "cat", steps=4))
    assert np.array_equal(repainted[:, 4:], np.asarray(first[0])[:, 4:])
    assert worker.edit("denoise", first[0], noise_level=0.3, steps=2).size == (8, 8)
