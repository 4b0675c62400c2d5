import io
import math
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from pipelines import storage
from pipelines.config import PipelineError
from pipelines.dataset import open_dataset
from pipelines.features.extractors import Extractor, open_extractor, own_judge
from pipelines.features.inception import Inception
from pipelines.features.learned import contrastive_loss, predict, train_contrastive

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = Extractor("own", "own", "0" * 64, nn.Flatten())
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


class Means(nn.Module):
    """Means of colours and their squares: six features of any picture."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x.mean(dim=(2, 3)), (x * x).mean(dim=(2, 3))), dim=1)


def colours(pixels):
    x = pixels / 127.5 - 1
    return np.concatenate((x.mean(axis=(1, 2)), (x**2).mean(axis=(1, 2))), axis=1)


def test_the_own_extractor_knows_the_classes_is_kept_and_is_found_again(tmp_path, tiny_dataset):
    dataset = open_dataset(tiny_dataset)
    judge = own_judge(str(tmp_path), "tiny", dataset, 150, 0)
    train = dataset.read("train")
    assert (predict(judge.classifier, train.pixels) == train.labels).mean() > 0.8
    features = judge.extractor.embed(train.pixels)
    assert features.shape == (len(train.ids), 96)
    (kept,) = (tmp_path / "features/tiny").glob("*/extractor-*.safetensors")
    before = kept.stat().st_mtime_ns
    again = own_judge(str(tmp_path), "tiny", dataset, 150, 0)
    assert np.array_equal(again.extractor.embed(train.pixels), features)
    assert kept.stat().st_mtime_ns == before
    elsewhere = open_extractor(str(kept), OWN, trust=False)
    assert np.array_equal(elsewhere.embed(train.pixels), features)


def test_without_labels_views_are_told_apart():
    """Red and blue noise: a trunk that has learned by itself puts pictures of one kind nearer to one another."""
    source = np.random.default_rng(2)
    coarse = np.kron(source.integers(0, 256, (40, 2, 2, 3)), np.ones((1, 4, 4, 1)))
    fine = source.integers(0, 256, (40, 8, 8, 3))
    pixels = np.concatenate((coarse, fine)).astype(np.uint8)
    features = Extractor("", "own", "", train_contrastive(pixels, 40, 0)).embed(pixels)
    apart = np.linalg.norm(features[:, None] - features[None], axis=2) + np.diag(np.full(80, np.inf))
    assert ((apart.argmin(axis=1) < 40) == (np.arange(80) < 40)).mean() > 0.9


def test_the_contrastive_loss_is_that_of_the_paper():
    z = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = (z / z.norm(dim=1, keepdim=True)).numpy()
    terms = []
    for i in range(6):
        likeness = [math.exp(float(unit[i] @ unit[k]) / 0.5) for k in range(6)]
        terms.append(-math.log(likeness[(i + 3) % 6] / (sum(likeness) - likeness[i])))
    assert contrastive_loss(z, 0.5).item() == pytest.approx(sum(terms) / 6)


def test_inception_has_the_layers_of_the_published_network():
    """23,834,568 parameters with a head of 1000 classes and without the auxiliary one; the trunk has no head."""
    network = Inception()
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_834_568 - 1000 * 2049
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_5b.branch5x5_2.conv.weight"] == (64, 48, 5, 5)
    assert shapes["Mixed_6a.branch3x3.conv.weight"] == (384, 288, 3, 3)
    assert shapes["Mixed_6c.branch7x7dbl_5.conv.weight"] == (192, 160, 1, 7)
    assert shapes["Mixed_7a.branch7x7x3_4.conv.weight"] == (192, 192, 3, 3)
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)


def test_inception_takes_the_users_weights_and_refuses_others(tmp_path):
    torch.manual_seed(0)
    network = Inception()
    weights = {**network.state_dict(), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(weights, tmp_path / "weights.pth")
    found = open_extractor(f"inception:{tmp_path}/weights.pth", OWN, trust=False)
    assert found.kind == "inception"
    features = found.embed(PIXELS[:2])
    assert features.shape == (2, 2048)
    assert np.isfinite(features).all()
    safetensors.torch.save_file({"conv.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(PipelineError, match=r"--features .*other\.safetensors: .*Missing key|Error"):
        open_extractor(f"inception:{tmp_path}/other.safetensors", OWN, trust=False)


def test_a_program_of_torch_export_and_one_of_torchscript_are_extractors(tmp_path):
    batch = torch.export.Dim("batch")
    program = torch.export.export(Means(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, tmp_path / "means.pt2")
    found = open_extractor(str(tmp_path / "means.pt2"), OWN, trust=False)
    assert np.allclose(found.embed(PIXELS), colours(PIXELS), atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
        with pytest.raises(PipelineError, match=r"means.pt: TorchScript may run any code; give --trust"):
            open_extractor(str(tmp_path / "means.pt"), OWN, trust=False)
        assert np.allclose(
            open_extractor(str(tmp_path / "means.pt"), OWN, trust=True).embed(PIXELS), colours(PIXELS), atol=1e-6
        )


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("some.bin", b"x", r"some.bin: need one of own, inception:WEIGHTS"),
        ("some.pt2", b"x", r"some.pt2: .*; need one of own, inception"),
        ("some.safetensors", b"x", r"some.safetensors: .*; need one of own"),
        ("plain.safetensors", safetensors.torch.save({"a": torch.zeros(1)}), "without the metadata of an extractor"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, name, data, told):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PipelineError, match=told):
        open_extractor(str(tmp_path / name), OWN, trust=False)


def test_a_missing_file_and_a_pickle_that_runs_code_are_refused(tmp_path):
    with pytest.raises(storage.StorageError, match=r"none\.pth"):
        open_extractor(f"inception:{tmp_path}/none.pth", OWN, trust=False)
    buffer = io.BytesIO()
    torch.save(Means(), buffer)
    (tmp_path / "code.pth").write_bytes(buffer.getvalue())
    with pytest.raises(PipelineError, match=r"code\.pth: "):
        open_extractor(f"inception:{tmp_path}/code.pth", OWN, trust=False)
