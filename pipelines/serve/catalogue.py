"""Which models a service has, and which version of each answers now."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from diffusion_core.config import ModelConfig
from pipelines import storage
from pipelines.config import PipelineError, ServeConfig
from pipelines.model import load_config, model_digest
from pipelines.registry import default_model
from pipelines.requests import RequestError

_log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Source:
    """A model by name: kept to the URI, or where that is None whatever is live of the name in the store."""

    name: str
    store: str
    uri: str | None = None

    def current(self) -> str:
        """URI of the version to serve now. Raises PipelineError where there is none, or it cannot be known."""
        try:
            return self.uri or default_model(self.store, self.name)
        except (KeyError, TypeError, AttributeError) as error:
            raise PipelineError(
                f"{self.name}: an entry of its log in {self.store} is not readable ({error})"
            ) from error


@dataclass(frozen=True)
class Version:
    """A published model under the name that it is served by."""

    name: str
    uri: str
    digest: str
    config: ModelConfig


def sources(config: ServeConfig) -> list[Source]:
    """The models of a service. Raises PipelineError where two have one name."""
    store = storage.normalise(config.store)
    found = [Source(config.name, store, config.model)]
    for entry in config.also:
        name, _, uri = entry.partition("=")
        found.append(Source(name, store, uri or None))
    names = [source.name for source in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PipelineError(f"also: {twice[0]} is served already; give each model a name of its own, as NAME=URI")
    return found


def open_version(name: str, uri: str) -> Version:
    """The version at a URI, without its weights. Raises PipelineError where it is missing or damaged."""
    uri = storage.normalise(uri)
    try:
        return Version(name, uri, model_digest(storage.read_manifest(uri, "model")), load_config(uri))
    except (KeyError, TypeError, AttributeError) as error:
        raise PipelineError(f"{uri}: {storage.MANIFEST} is not that of a model ({error}); publish it again") from error


@dataclass
class Catalogue:
    """What is served: the version of each source that new requests get, and what stands in the way of a newer one.

    `prepare` brings a version into an engine's memory before requests are sent to it.
    """

    sources: list[Source]
    prepare: Callable[[Version], Awaitable[str | None]]
    live: dict[str, Version] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Whether every model can answer."""
        return len(self.live) == len(self.sources)

    def __iter__(self) -> Iterator[Version]:
        return iter([self.live[source.name] for source in self.sources if source.name in self.live])

    def find(self, model: str | None) -> Version:
        """The version that answers for a name, or the first one's. Raises RequestError where there is no such model."""
        wanted = self.sources[0].name if model is None else model
        found = next((each for each in self if wanted in (each.name, each.digest)), None)
        if found is None:
            names = ", ".join(source.name for source in self.sources)
            raise RequestError("model", f"no model {wanted!r} here now; there are {names}")
        return found

    async def refresh(self) -> None:
        """Look what is live, and let new requests have it once an engine has loaded it."""
        for source in self.sources:
            try:
                uri = await asyncio.to_thread(source.current)
                if source.name not in self.live or self.live[source.name].uri != storage.normalise(uri):
                    await self._change(await asyncio.to_thread(open_version, source.name, uri))
                else:
                    self.problems.pop(source.name, None)
            except PipelineError as error:
                self._tell(source.name, str(error))

    async def watch(self, every: float) -> None:
        """Refresh for ever, `every` so many seconds."""
        while True:
            await self.refresh()
            await asyncio.sleep(every)

    async def _change(self, version: Version) -> None:
        """Serve a version from now on, unless no engine can load it."""
        problem = await self.prepare(version)
        if problem is not None:
            self._tell(version.name, problem)
            return
        self.live[version.name] = version
        self.problems.pop(version.name, None)
        _log.warning("serve: %s is now %s (%s)", version.name, version.digest[:12], version.uri)

    def _tell(self, name: str, problem: str) -> None:
        """Remember a problem, and log it once."""
        if self.problems.get(name) != problem:
            _log.warning("serve: %s stays as it is: %s", name, problem)
        self.problems[name] = problem
