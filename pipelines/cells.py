"""Cells of tables: as text, and as the address of an object."""

import math
import re
from typing import Any

from pipelines import storage

_S3 = re.compile(r"s3://[A-Za-z0-9._-]{3,63}/.+", re.DOTALL)
_LONGEST_ADDRESS = 1024


def resolve(base: str, address: str) -> str:
    """The URI that a table or shard at `base` means. Raises ValueError on an address of a kind that is not read."""
    if "\0" in address or len(address) > _LONGEST_ADDRESS:
        raise ValueError(f"{address[:60]!r}: no address")
    if address.startswith("s3://") and not _S3.fullmatch(address):
        raise ValueError(f"{address}: not of the form s3://bucket/key")
    if "://" in address or address.startswith("/"):
        if not address.startswith(("s3://", "file://", "/")):
            raise ValueError(f"{address}: only paths and s3:// are read; fetch it into a folder or bucket first")
        return storage.normalise(address)
    return storage.join(base.rsplit("/", 1)[0], address)


def printable(text: str) -> str:
    """Text that can be stored as UTF-8: what a name in another encoding has instead of letters is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def word(value: Any) -> str | None:
    """A class or caption as text; None where there is none. Whole numbers read the same from any column type."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)
