import pytest

from pipelines import config
from pipelines.config import GenerateConfig, IngestConfig, PipelineError, TraceConfig, TrainConfig
from pipelines.flow_config import DemoConfig, InpaintFlow, NightlyConfig


def parse(kind, *flags):
    return config.parse(kind, "program", flags)


def test_flags_become_settings_with_absolute_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parsed = parse(IngestConfig, "--source", "pictures", "--source", "s3://bucket/more/", "--resolution", "64")
    assert parsed.source == [str(tmp_path / "pictures"), "s3://bucket/more"]
    assert (parsed.resolution, parsed.store) == (64, str(tmp_path / "runs/demo"))


def test_nested_settings_have_dotted_flags():
    parsed = parse(DemoConfig, "--train.steps", "7", "--generate.guidance-scale", "1.5")
    assert (parsed.train.steps, parsed.generate.guidance_scale) == (7, 1.5)
    assert parsed.train.preset == TrainConfig.model_fields["preset"].default


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--source", "x", "--resolutoin", "32"], "--resolutoin"),
        (["--source", "x", "--resolution", "4"], "--resolution '4': .*greater than or equal to 8"),
        (["--source", "x", "--resolution", "big"], "--resolution 'big': .*integer"),
        ([], "--source"),
        (["--source", "ftp://x/y"], "unknown kind of address"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(flags, told):
    with pytest.raises(PipelineError, match=told) as raised:
        parse(IngestConfig, *flags)
    assert "\n" not in str(raised.value)


def test_the_environment_takes_no_part(monkeypatch):
    monkeypatch.setenv("RESOLUTION", "99")
    monkeypatch.setenv("STORE", "elsewhere")
    assert parse(IngestConfig, "--source", "x") == IngestConfig(source=["x"])


def test_what_is_traced_may_stand_first_without_its_flag():
    for flags in (["/a/b", "--row", "3"], ["--row", "3", "--uri", "/a/b"]):
        assert parse(TraceConfig, *flags) == TraceConfig(uri="/a/b", row=3)
    with pytest.raises(PipelineError, match="--uri"):
        parse(TraceConfig, "--row", "3")


def test_flags_of_changed_values_are_enough():
    settings = TrainConfig(dataset="/d", name="n", steps=7)
    short = config.to_flags(settings, changed=True)
    assert "--preset" not in short
    assert parse(TrainConfig, *short) == settings


def test_unknown_keys_are_errors():
    with pytest.raises(ValueError, match="resolutoin"):
        IngestConfig(source=["x"], resolutoin=32)


def test_flags_of_settings_give_the_same_settings():
    for settings in (
        IngestConfig(source=["/a", "s3://b/c"], heldout=0.25),
        TrainConfig(dataset="/d", flip=True, workers=2),
        GenerateConfig(model="/m", via="serve"),
    ):
        assert parse(type(settings), *config.to_flags(settings)) == settings


def test_what_nobody_set_stays_unset_on_its_way_to_a_stage_and_to_a_cluster(tmp_path):
    command = parse(config.TrainCommand, "--from", "/m", "--dataset", "/d", "--prediction", "edm")
    settings = config.narrow(command, TrainConfig)
    assert settings.parent == "/m"
    assert {"parent", "dataset", "prediction"} <= settings.model_fields_set
    assert not {"preset", "schedule", "steps"} & settings.model_fields_set
    there = parse(config.TrainCommand, *config.to_flags(settings))
    assert (there.store, there.model_fields_set) == (settings.store, settings.model_fields_set)


def test_a_time_to_train_in_does_not_go_with_a_parent():
    with pytest.raises(PipelineError, match="--budget chooses a network, but with --parent it is the parent's"):
        parse(config.TrainCommand, "--parent", "/m", "--dataset", "/d", "--budget", "1h")


def test_identity_follows_what_is_made_and_not_how():
    base = TrainConfig(dataset="/d")
    digest = config.identity("train", 1, config.what(base), "input")
    how = base.model_copy(update={"workers": 2, "store": "/elsewhere", "checkpoint_every": 7})
    assert config.identity("train", 1, config.what(how), "input") == digest
    others = [base.model_copy(update={"steps": 7}), base.model_copy(update={"seed": 7})]
    digests = {config.identity("train", 1, config.what(other), "input") for other in others}
    digests |= {config.identity("train", 2, config.what(base), "input"), digest}
    digests |= {config.identity("train", 1, config.what(base), "other input")}
    assert len(digests) == 5


def test_one_lane_is_refused():
    with pytest.raises(PipelineError, match="need 2 or more, or 0 to measure"):
        parse(GenerateConfig, "--model", "m", "--name", "n", "--lanes", "1")


@pytest.mark.parametrize(
    "flags",
    ["--prompt penguin", "--task vary", "--inpainting replacement", "--solves 3", "--resample 2", "--noise-level 0.3",
     "--strength 0.5"],
)  # fmt: skip
def test_settings_of_a_tables_rows_are_refused_without_a_table_before_anything_else_is_made(flags):
    name, value = flags.split()
    told = f"{name} is for rows of a --table, and there is none; without one, give --classes alone"
    with pytest.raises(PipelineError, match=told):
        parse(GenerateConfig, "--model", "/m", "--count", "1000", name, value)
    with pytest.raises(PipelineError, match=told):
        parse(DemoConfig, f"--generate.{name.removeprefix('--')}", value)
    assert parse(GenerateConfig, "--model", "/m", "--table", "t.csv", name, value).table
    assert parse(NightlyConfig, "--source", "/in", "--table", "t.csv", f"--generate.{name[2:]}", value).table


def test_settings_of_pictures_without_a_table_are_refused_with_one():
    with pytest.raises(PipelineError, match="--classes is for rows without a table"):
        parse(NightlyConfig, "--source", "/in", "--table", "t.csv", "--generate.classes", "cat")
    with pytest.raises(PipelineError, match="--table names the pictures and masks"):
        parse(InpaintFlow, "--model", "/m")
    assert parse(GenerateConfig, "--model", "/m", "--negative-prompt", "cat", "--classes", "penguin").classes
