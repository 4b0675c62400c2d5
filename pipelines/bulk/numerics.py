"""The numerics profile of a job: what its first worker has, and all others must have as well."""

from pipelines import storage
from pipelines.config import GenerateConfig, PipelineError

Numerics = dict[str, str | int]
_NAME = "numerics.json"


def pinned(uri: str) -> Numerics | None:
    """The profile that a job's first worker had; None where none has begun."""
    try:
        found: Numerics = storage.read_json(storage.join(uri, _NAME))
    except storage.NotFoundError:
        return None
    return found


def as_pinned(config: GenerateConfig, profile: Numerics | None, flags: bool = True) -> GenerateConfig:
    """The settings with the lanes and threads of a job's profile, where there is one.

    With `flags`, one of these that says how many stays.
    """
    there = {name: int(value) for name, value in (profile or {}).items() if name in ("lanes", "threads")}
    said = {name for name in config.model_fields_set if flags and getattr(config, name)}
    return config.model_copy(update={name: value for name, value in there.items() if name not in said})


def pin(uri: str, profile: Numerics) -> None:
    """Make a profile the job's, or compare it with the one that is.

    Raises PipelineError where another is: pictures of the two would differ in single values, and the set be a mixture.
    """
    if storage.create_bytes(storage.join(uri, _NAME), storage.to_json(profile)) != "other":
        return
    first = pinned(uri) or {}
    told = ", ".join(
        f"{name} {first.get(name)} there, {profile.get(name)} here"
        for name in sorted({*first, *profile})
        if first.get(name) != profile.get(name)
    )
    raise PipelineError(
        f"{uri}: begun on another kind of device ({told}), where bytes differ; go on there, or begin anew with another "
        "--name"
    )
