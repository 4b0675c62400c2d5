"""The pictures that rows name: read, or why a row can never have them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pydantic import ValidationError

from pipelines import storage
from pipelines.bulk.job import Order
from pipelines.bulk.rows import refusal
from pipelines.requests import ImageRequest

_AT_A_TIME = 16


class Rejection(NamedTuple):
    """Why a row can never be made: a word for accounting, and the words."""

    reason: str
    error: str


def read_requests(orders: Sequence[Order]) -> list[ImageRequest | Rejection]:
    """Each row's request with its pictures in it, or why there is none.

    Raises StorageError where the storage fails: that is no reason to reject a row.
    """
    if not any(order.files for order in orders):
        return [_request(order) for order in orders]
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return list(pool.map(_request, orders))


def _request(order: Order) -> ImageRequest | Rejection:
    if order.refused:
        return Rejection("bad_row", order.refused)
    files: dict[str, bytes] = {}
    for name, file in order.files.items():
        try:
            files[name] = file if isinstance(file, bytes) else storage.read_bytes(file)
        except storage.NotFoundError as error:
            return Rejection("missing_object", f"{name}: {error}")
    try:
        return ImageRequest(**order.asked, **files)
    except ValidationError as error:
        return Rejection("bad_row", str(refusal(error)))
