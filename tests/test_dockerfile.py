"""The Dockerfile's steps in a bare Debian: what they leave is an image that works."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT
from support.clean_root import build

pytestmark = [pytest.mark.image, pytest.mark.timeout(1200)]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("debootstrap") is None, reason="needs root and debootstrap")
def test_the_dockerfile_makes_a_working_image_in_a_bare_debian():
    with tempfile.TemporaryDirectory(prefix="clean-root-") as work:
        # PyTorch's own index is out of reach here; what the package index has is taken in its place.
        image = build(ROOT / "infra/Dockerfile", Path(work), {"DEVICE": "cuda"})
        assert image.run(["id", "--user"]).strip() == "1000"
        assert "Train a diffusion U-Net" in image.run(["python", "-m", "pipelines", "--help"])
        made = image.run(["python", "-m", "pipelines", "draw", "--store", "/work/store", "--count", "4"])
        assert "/work/store/" in made
        for program in ("ray", "serve", "prefect"):
            assert "Usage" in image.run([program, "--help"])
        for program in ("wget", "bash", "rsync", "ssh"):
            assert image.run(["which", program])
        # As Ray's launcher runs commands.
        assert "ray, version" in image.run(["bash", "--login", "-c", "ray --version"])
        image.run(["python", "-c", "import torch, boto3, flows, pipelines.serve, pipelines.train, pipelines.bulk"])
        assert "None" in image.run(["python", "-c", "import importlib.util as u; print(u.find_spec('pytest'))"])
