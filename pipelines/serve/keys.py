"""API keys: who may ask, and for how much. Only hashes of keys are ever stored."""

import hashlib
import hmac
import json
import secrets
import time
from dataclasses import dataclass, field

from pydantic import Field, TypeAdapter, ValidationError

from pipelines import storage
from pipelines.config import KeyConfig, PipelineError, Settings
from pipelines.progress import print_line

_BYTES = 32
_MINUTE_S = 60.0


class Key(Settings):
    """One key: whose it is, the SHA-256 of it, and what it may ask for.

    A plain hash is enough: keys are 256 random bits, and nothing can be guessed.
    """

    name: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    pictures_per_minute: float | None = Field(None, gt=0)
    requests_at_once: int | None = Field(None, ge=1)


def anybody(name: str) -> Key:
    """Who asks where no keys are asked for, told apart by a name alone."""
    return Key(name=name, sha256="0" * 64)


_KEYS = TypeAdapter(list[Key])


def read_keys(uri: str) -> list[Key]:
    """The keys of a file. Raises PipelineError, without a word of its content, where it is none."""
    try:
        return _KEYS.validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        told = f"{where}: {error.errors()[0]['msg']}"
        raise PipelineError(f"{uri}: no file of keys ({told}); make one by the key stage") from None


def make_key(config: KeyConfig) -> None:
    """Print a new key, and write its hash beside those that there are; or take the keys of a name out."""
    keys = read_keys(config.key_file) if storage.exists(config.key_file) else []
    if config.revoke:
        left = [key for key in keys if key.name != config.name]
        _write(config.key_file, left)
        print_line(f"key: {len(keys) - len(left)} keys of {config.name} revoked; restart the service to apply it")
        return
    secret = "sk-" + secrets.token_urlsafe(_BYTES)
    told = config.model_dump(include={"pictures_per_minute", "requests_at_once"})
    _write(config.key_file, [*keys, Key(name=config.name, sha256=_hash(secret), **told)])
    print_line(f"key: for {config.name}, shown this once: {secret}")


def _write(uri: str, keys: list[Key]) -> None:
    storage.write_bytes(uri, json.dumps([key.model_dump(exclude_none=True) for key in keys], indent=1).encode())


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


@dataclass
class _Use:
    """What a key has left of this minute, and the requests that it has under way."""

    left: float
    at: float
    running: int = 0


@dataclass
class KeyRing:
    """The keys of a service and their use here; limits are shared out over so many `ingresses`.

    Without keys everybody may ask.
    """

    keys: list[Key] = field(default_factory=list)
    ingresses: int = 1
    _uses: dict[str, _Use] = field(default_factory=dict)

    def find(self, authorization: str | None) -> Key | None:
        """The key that an Authorization header holds. Compares with all of them, in the same time for each."""
        scheme, _, secret = (authorization or "").partition(" ")
        given = _hash(secret.strip()) if scheme.lower() == "bearer" else ""
        found = None
        for key in self.keys:
            if hmac.compare_digest(given.encode(), key.sha256.encode()):
                found = key
        return found

    def enter(self, key: Key) -> str | None:
        """Begin a request; what forbids it, in words, or None."""
        use = self._use(key)
        if key.requests_at_once is not None and use.running >= max(1, key.requests_at_once // self.ingresses):
            return f"requests_at_once: {use.running} requests of {key.name} are under way already"
        use.running += 1
        return None

    def leave(self, key: Key) -> None:
        """End a request."""
        use = self._use(key)
        use.running -= 1
        if not use.running and key.pictures_per_minute is None:
            del self._uses[key.name]  # without keys there is a name for each address that ever asked

    def spend(self, key: Key, pictures: int) -> float:
        """Take pictures from what is left of the minute; 0, or the seconds after which they would be there."""
        if key.pictures_per_minute is None:
            return 0.0
        most, use, now = self._most(key), self._use(key), time.monotonic()
        use.left, use.at = min(most, use.left + (now - use.at) * most / _MINUTE_S), now
        if pictures > use.left:
            return (pictures - use.left) * _MINUTE_S / most
        use.left -= pictures
        return 0.0

    def _most(self, key: Key) -> float:
        return (key.pictures_per_minute or 0.0) / self.ingresses

    def _use(self, key: Key) -> _Use:
        if key.name not in self._uses:
            self._uses[key.name] = _Use(self._most(key), time.monotonic())
        return self._uses[key.name]
