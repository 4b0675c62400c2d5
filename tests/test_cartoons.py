import hashlib
import io
import json
import subprocess
import sys
import tarfile

import pytest
from PIL import Image

from pipelines import cartoons, storage
from pipelines.config import DrawConfig


def test_the_same_seed_draws_the_same_bytes_in_another_process():
    code = "import hashlib, pipelines.cartoons as c; print(hashlib.sha256(c.tar_shard(3, 5, 9, 16)).hexdigest())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == hashlib.sha256(cartoons.tar_shard(3, 5, 9, 16)).hexdigest()
    assert cartoons.tar_shard(4, 5, 9, 16) != cartoons.tar_shard(3, 5, 9, 16)


def test_a_shard_is_a_webdataset_with_class_and_caption():
    with tarfile.open(fileobj=io.BytesIO(cartoons.tar_shard(0, 100, 16, 32))) as tar:
        names = tar.getnames()
        assert names == [f"{index:06}.{suffix}" for index in range(100, 116) for suffix in ("png", "json")]
        meta = json.load(tar.extractfile("000104.json"))
        picture = Image.open(tar.extractfile("000104.png"))
    assert (picture.mode, picture.size) == ("RGB", (32, 32))
    assert meta["class"] == cartoons.CHARACTERS[104 % len(cartoons.CHARACTERS)]
    assert meta["class"] in meta["caption"]


def test_a_caption_states_every_attribute():
    for index in range(64):
        drawn = cartoons.cartoon(1, index)
        caption = drawn.caption
        assert drawn.caption.startswith(("a ", "an "))
        for attribute in (drawn.character, drawn.background, drawn.head, drawn.eyes, drawn.hair):
            assert attribute in caption
        assert drawn.accessory in ("none", "") or drawn.accessory in caption


def test_the_picture_is_the_same_at_any_size():
    drawn = cartoons.cartoon(2, 11)
    small = cartoons.draw(drawn, 16)
    large = cartoons.draw(drawn, 128).resize((16, 16), Image.Resampling.BOX)
    far = max(abs(a - b) for a, b in zip(small.tobytes(), large.tobytes(), strict=True))
    assert far < 80
    with pytest.raises(ValueError, match="resolution is 7"):
        cartoons.draw(drawn, 7)


def test_the_stage_writes_shards_once_and_finds_them_again(tmp_path):
    config = DrawConfig(store=str(tmp_path), count=50, shard_size=20, resolution=8)
    assert cartoons.find(config) is None
    made = cartoons.run(config)
    manifest = storage.read_manifest(made.uri, "cartoons")
    shards = [storage.read_part(made.uri, part) for part in manifest["parts"]]
    assert shards == [cartoons.tar_shard(0, first, count, 8) for first, count in ((0, 20), (20, 20), (40, 10))]
    found = cartoons.find(config)
    assert found is not None
    assert (found.uri, found.found) == (made.uri, True)
    assert cartoons.find(config.model_copy(update={"seed": 1})) is None
