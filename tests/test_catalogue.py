import asyncio
import shutil
from pathlib import Path

import pytest
from ray.exceptions import RayError
from support.models import publish

from pipelines.config import PipelineError, PromoteConfig, RollbackConfig, ServeConfig
from pipelines.registry import promote, roll_back
from pipelines.requests import RequestError
from pipelines.serve.catalogue import Catalogue, open_version, sources
from pipelines.serve.stage import loaded


def make_live(uri):
    promote(PromoteConfig(model=uri, force=True, reason="test"))


def catalogue(prepared=None, problem=None, **settings):
    async def prepare(version):
        if prepared is not None:
            prepared.append(version.uri)
        return problem

    return Catalogue(sources(ServeConfig(**settings)), prepare)


def refreshed(one):
    asyncio.run(one.refresh())
    return {version.name: version.uri for version in one}


def test_a_name_follows_its_promotions_and_an_address_does_not(tmp_path):
    store = str(tmp_path)
    first, second, pinned = (publish(store, number) for number in (1, 2, 3))
    make_live(first)
    prepared = []
    one = catalogue(prepared, store=store, name="tiny", also=[f"kept={pinned}"])
    assert refreshed(one) == {"tiny": first, "kept": pinned}
    make_live(second)
    assert refreshed(one) == {"tiny": second, "kept": pinned}
    roll_back(RollbackConfig(store=store, name="tiny"))
    assert refreshed(one) == {"tiny": first, "kept": pinned}
    assert prepared == [first, pinned, second, first], "an engine has it before anybody is sent there"
    assert one.ready


def test_a_model_is_found_by_name_and_by_the_digest_of_its_live_version(tmp_path):
    uris = [publish(str(tmp_path), 1, name="cats"), publish(str(tmp_path), 2, name="dogs")]
    one = catalogue(store=str(tmp_path), name="cats", also=["dogs"])
    assert refreshed(one) == dict(zip(("cats", "dogs"), uris, strict=True))
    assert one.find(None).uri == one.find("cats").uri == one.find(one.live["cats"].digest).uri == uris[0]
    assert one.find("dogs").uri == uris[1]
    with pytest.raises(RequestError, match="model: no model 'birds' here now; there are cats, dogs"):
        one.find("birds")


def test_what_no_engine_can_load_does_not_answer(tmp_path):
    first, second = publish(str(tmp_path), 1), publish(str(tmp_path), 2)
    make_live(first)
    one = catalogue(store=str(tmp_path), name="tiny")
    assert refreshed(one) == {"tiny": first}
    make_live(second)

    async def cannot(_):
        return "model.safetensors: checksum differs"

    one.prepare = cannot
    assert refreshed(one) == {"tiny": first}
    assert one.problems == {"tiny": "model.safetensors: checksum differs"}


def test_a_damaged_configuration_and_a_store_out_of_reach_leave_things_as_they_are(tmp_path):
    store = tmp_path / "store"
    first, second = publish(str(store), 1), publish(str(store), 2)
    make_live(first)
    one = catalogue(store=str(store), name="tiny")
    assert refreshed(one) == {"tiny": first}
    config = Path(second) / "config.json"
    whole = config.read_bytes()
    make_live(second)
    config.write_bytes(b"{}" + whole[2:])
    assert refreshed(one) == {"tiny": first}
    assert "config.json" in one.problems["tiny"]
    shutil.move(store, tmp_path / "away")
    assert refreshed(one) == {"tiny": first}
    shutil.move(tmp_path / "away", store)
    config.write_bytes(whole)
    assert refreshed(one) == {"tiny": second}
    assert one.problems == {}


def test_two_models_cannot_have_one_name(tmp_path):
    with pytest.raises(PipelineError, match="also: cats is served already"):
        sources(ServeConfig(name="cats", also=["dogs", "cats=/somewhere"]))
    with pytest.raises(ValueError, match="need a name, or NAME=URI"):
        ServeConfig(also=["=x"])


def test_a_version_is_known_without_its_weights(tmp_path):
    uri = publish(str(tmp_path), 1)
    (Path(uri) / "model.safetensors").unlink()
    assert open_version("tiny", uri).config.class_names == ("cat", "dog")


class GoneError(RayError):
    pass


@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_an_engine_that_is_gone_is_waited_for_where_nothing_else_answers(patience):
    ends = [GoneError("killed"), GoneError("killed"), None, None]

    async def load():
        end = ends.pop(0)
        if end is not None:
            raise end

    if patience:
        assert asyncio.run(loaded(load, patience, 0.01)) is None
        assert ends == [None], "and asked no more than it must be"
    else:
        with pytest.raises(GoneError):
            asyncio.run(loaded(load, patience, 0.01))
        assert len(ends) == 3
