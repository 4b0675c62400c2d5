import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest
from conftest import ROOT
from support.service import local_service
from test_worker import BOX, mask

import flows
from diffusion_core.config import PRESETS, GridName, Prediction, SamplerName, ScheduleName, Weighting
from pipelines.config import PipelineError, SampleOptions, parse
from pipelines.jobs import STAGES
from pipelines.serve.schemas import DenoiseForm, EditForm, GenerationBody, VariationForm

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    return re.findall(r"```\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands():
    for page in PAGES:
        for block in blocks(page):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(make|python) ", line):
                    yield pytest.param(line.split("    #")[0].strip(), id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize("command", list(commands()))
def test_every_command_that_is_shown_exists_with_its_settings(command):
    words = shlex.split(command)
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        run = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return
    if words[1].startswith("infra/"):
        importlib.import_module(words[1].removesuffix(".py").replace("/", ".")).flags().parse_args(words[2:])
        return
    if words[1] == "flows.py":
        program, kind, flags = "flows.py", flows.FLOWS[words[2]][1], words[3:]
    else:
        assert words[1:3] == ["-m", "pipelines"]
        program, kind, flags = "pipelines", STAGES[words[3]].flags, words[4:]
    if "--help" not in flags:
        parse(kind, program, flags)


def test_every_ray_command_that_is_shown_exists_and_none_starts_without_a_token():
    from ray.scripts.scripts import cli

    shown = set()
    for page in PAGES:
        for block in blocks(page):
            for line in block.splitlines():
                if line.startswith("ray "):
                    _, name, *flags = shlex.split(line, comments=True)
                    cli.commands[name].make_context(name, flags)
                    shown.add(name)
            before, started, _ = block.partition("ray start")
            assert not started or "export RAY_AUTH_MODE=token" in before, f"{page.name}: {block}"
    assert shown >= {"get-auth-token", "start", "up", "dashboard"}


def test_flows_are_put_onto_a_server_with_their_automations():
    deployed = []
    for page in PAGES:
        for block in blocks(page):
            if "prefect --no-prompt deploy" in block:
                _, after = block.split("--prefect-file infra/prefect.yaml")
                assert "python infra/automations.py" in after, (
                    f"{page.name}: without automations lost runs stay running"
                )
                deployed.append(page.name)
    assert sorted(deployed) == ["kubernetes.md", "operate.md"]


def test_the_python_that_is_shown_runs_and_prints_what_is_shown(tiny_model, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/python.md").read_text()
    pipeline, core = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    store, _, name = tiny_model.partition("/models/")
    monkeypatch.chdir(tmp_path)
    exec(pipeline.replace('"runs/demo", "cartoons"', f'"{store}", "{name.split("/")[0]}"'), {})
    assert (tmp_path / "penguin.png").exists()
    exec(core, {})
    assert f"prints `{capsys.readouterr().out.strip()}`." in page


def test_the_edits_that_are_shown_run(tiny_model, tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/editing.md").read_text(), flags=re.DOTALL)
    store, _, name = tiny_model.partition("/models/")
    monkeypatch.chdir(tmp_path)
    exec(block.replace('"runs/demo", "cartoons"', f'"{store}", "{name.split("/")[0]}"'), {})
    assert {path.name for path in tmp_path.iterdir()} == {"repainted.png", "denoised.png", "cat.png", "variation.png"}


def test_the_engine_that_is_shown_prints_what_is_shown(capsys):
    page = (ROOT / "docs/engine.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(block, {})
    assert f"```\n{capsys.readouterr().out}```" in page


def test_the_calls_that_are_shown_run(tiny_model, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/call-the-service.md").read_text()
    (python,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mask.png").write_bytes(mask(BOX))
    with local_service(tiny_model) as service:
        exec(python.replace("http://127.0.0.1:8000", service.url), {})
        assert capsys.readouterr().out.split() == ["image_generation.partial_image"] * 3 + [
            "image_generation.completed"
        ]
        curls = [
            line.replace("http://127.0.0.1:8000", service.url) for line in page.splitlines() if line.startswith("curl")
        ]
        assert len(curls) == 5
        for curl in curls if shutil.which("curl") else []:
            told = subprocess.run(shlex.split(curl), capture_output=True, text=True, check=True, timeout=60).stdout
            assert '"b64_json"' in told, told


def test_every_field_and_metric_of_the_service_is_explained():
    page = (ROOT / "docs/call-the-service.md").read_text() + (ROOT / "docs/python.md").read_text()
    for body in (GenerationBody, EditForm, DenoiseForm, VariationForm):
        assert [name for name in body.model_fields if f"`{name}`" not in page] == []
    for stage, page in (("serve", "service"), ("train", "cluster-training"), ("bulk", "bulk")):
        metrics = set(re.findall(r'"(diffusion_\w+)"', (ROOT / f"pipelines/{stage}/metrics.py").read_text()))
        assert metrics == set(re.findall(r"`(diffusion_\w+)`", (ROOT / f"docs/{page}.md").read_text()))


def test_options_shown_for_python_are_all_that_there_are_with_their_defaults():
    rows = re.findall(r"^\| (`[^|]*) \| [^|]* \| ([^|]*) \|$", (ROOT / "docs/python.md").read_text(), flags=re.M)
    shown = {}
    for names, defaults in rows:
        shown |= zip(re.findall(r"`(\w+)`", names), defaults.split(", "), strict=True)
    options = {name: str(value) for name, value in SampleOptions().model_dump().items()}
    assert {"prompt", "n", "seed"} == set(shown) - set(options)
    assert {name: float(v) if v[0].isdigit() else v for name, v in options.items()} == {
        name: float(v) if v[0].isdigit() else v for name, v in shown.items() if name in options
    }


def test_the_core_page_has_every_name_that_a_setting_takes():
    page = (ROOT / "docs/core.md").read_text()
    for kind in (Prediction, Weighting, ScheduleName, GridName, SamplerName):
        assert [name for name in get_args(kind) if f"`{name}`" not in page] == []
    assert [name for name in PRESETS if f"| `{name}` |" not in page] == []


def test_a_command_with_a_wrong_setting_would_be_noticed():
    with pytest.raises(PipelineError, match="--stepz"):
        parse(STAGES["train"].config, "pipelines", ["--dataset", "x", "--stepz", "1"])


# Of docker, kubectl, ray, pytest and prefect, in the pages that tell of them.
OTHERS_FLAGS = {
    "--build", "--build-arg", "--deadline-remaining-seconds", "--detach", "--file", "--filename", "--from-literal",
    "--rm", "--scale", "--tag", "--address", "--dashboard-host", "--metrics-export-port", "--port", "--generate",
    "--all", "--no-prompt", "--params", "--pool", "--prefect-file", "--type", "--exclude",
    "--reason-message", "--expect",  # the last is a message's, with a gap behind
}  # fmt: skip


def test_make_bench_runs_every_command_of_the_results():
    bench = importlib.import_module("benchmarks.all")
    known = {"MODEL", "DATASET", "SCRATCH", "TARS", "EMOJI", "FOLDER", "STORE", "NAME"}
    found = bench.figures()
    assert len(found) > 40
    for figure in found:
        words = shlex.split(figure.command)
        assert {word for word in words if word.isupper()} <= known, figure.command
        if words[1:3] == ["-m", "pipelines"]:
            parse(STAGES[words[3]].flags, "pipelines", words[4:])
        elif words[0] == "python" and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), figure.command
    (again,) = [figure for figure in found if "--cluster" in figure.command]
    assert again.command.startswith("python flows.py pipeline --source"), "as above, with other flags"
    (stall,) = [figure.about for figure in found if "training.py stall" in figure.command]
    assert [about.split(":")[0].split(" (")[0] for about in stall] == [
        "CPU time that a checkpoint takes from the steps beside it", "as above, wall time, two rounds",
    ]  # fmt: skip
    filled = bench.filled("python benchmarks/engine.py MODEL", {"MODEL": "here"})
    assert filled[1:] == ["benchmarks/engine.py", "here"]
    assert bench.filled("python benchmarks/engine.py MODEL", {"MODEL": None}) == "no MODEL"


def test_trials_chosen_by_name_in_the_text_exist():
    chosen = []
    for page in PAGES:
        for file, names in re.findall(r'pytest [^`\n]*(tests/\w+\.py) -k ("[^"]+"|\w+)', page.read_text()):
            trials = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), flags=re.M)
            for name in re.findall(r"\w+", names.replace(" or ", " ")):
                assert any(name in trial for trial in trials), f"{page.name}: no {name!r} in {file}"
                chosen.append(name)
    assert len(chosen) > 3


def test_flags_named_in_the_text_exist():
    kinds = [stage.flags for stage in STAGES.values()] + [kind for _, kind in flows.FLOWS.values()]
    known = {"--help", "--flags", "--generate"}
    for script in ("up", "automations"):
        parser = importlib.import_module(f"infra.{script}").flags()
        known |= {flag for action in parser._actions for flag in action.option_strings}
    for benchmark in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r"--[a-z][a-z-]*[a-z]", benchmark.read_text().split('"""')[1]))
    for kind in kinds:
        for name, field in kind.model_fields.items():
            flag = name.replace("_", "-")
            known |= {f"--{flag}", f"--no-{flag}"} if field.annotation is bool else {f"--{flag}"}
            known |= {f"--{other}" for other in getattr(field.validation_alias, "choices", [])}
            for inner in getattr(field.annotation, "model_fields", {}):
                known.add(f"--{name}.{inner}".replace("_", "-"))
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", page.read_text()))
        assert named - known - OTHERS_FLAGS - {"--head", "--logdir", "--rounds", "--source"} == set(), page.name


def test_the_tree_in_the_readme_is_the_repository():
    block = next(text for text in blocks(ROOT / "README.md") if text.startswith("README.md"))
    shown, folders = set(), []
    for line in block.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        elif depth:
            shown.add("".join(folders) + name)
        else:
            shown |= set(re.split(r"  +", line)[:6])
    shown = {name for name in shown if re.fullmatch(r"[\w./-]+", name)}
    for name in shown:
        assert (ROOT / name).exists(), f"{name} is in the README but not in the repository"
    stages = ("bulk", "ingest", "lineage", "serve", "train", "worker")
    for package in ("diffusion_core", "pipelines", *(f"pipelines/{name}" for name in stages)):
        files = {f"{package}/{path.name}" for path in (ROOT / package).iterdir() if path.suffix in (".py", ".j2")}
        assert files - shown == {f"{package}/__init__.py"}
    assert {f"pipelines/serve/page/{path.name}" for path in (ROOT / "pipelines/serve/page").iterdir()} <= shown


def test_every_link_and_picture_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_dependency_is_pinned_and_explained():
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.findall(
        r'^    "([A-Za-z0-9-]+)', text[text.index("dependencies = [") : text.index("[project.optional")], re.M
    )
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    explained = (ROOT / "docs/dependencies.md").read_text()
    assert listed
    for name in listed:
        assert name.lower() in pinned
        assert name in explained


def test_no_page_carries_the_path_of_a_machine():
    for page in PAGES:
        assert not re.search(r"/(home|root|work|Users)/", page.read_text()), page.name
    assert Path(ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
