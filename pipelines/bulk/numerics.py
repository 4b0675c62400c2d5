"""The numerics profile of a job: what its first worker has, and all others must have as well."""

from pipelines import storage
from pipelines.config import PipelineError

Numerics = dict[str, str | int]
_NAME = "numerics.json"


def pinned(uri: str) -> Numerics | None:
    """The profile that a job's first worker had; None where none has begun."""
    try:
        found: Numerics = storage.read_json(storage.join(uri, _NAME))
    except storage.NotFoundError:
        return None
    return found


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
