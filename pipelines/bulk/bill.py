"""What a job has cost: denoiser calls, device seconds and bytes, and the price of them."""

from dataclasses import dataclass
from typing import Any

from pipelines.bulk.shards import Record

_HOUR = 3600.0


@dataclass
class Bill:
    """Sums over shards; `price` is that of a device's hour, None where it was not told.

    Of the rejected rows the `skipped` ones were wrong in the table, and were left out by request.
    """

    price: float | None = None
    pictures: int = 0
    rejected: int = 0
    skipped: int = 0
    calls: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def add(self, record: Record) -> None:
        """Add a shard."""
        spent = record["spent"]
        self.pictures += spent["pictures"]
        self.rejected += record["part"].get("rejected", {}).get("rows", 0)
        self.skipped += record["part"].get("reasons", {}).get("bad_row", 0)
        self.calls += spent["calls"]
        self.seconds += spent["seconds"]
        self.bytes += spent["bytes"]

    @property
    def rows(self) -> int:
        """Rows that are settled."""
        return self.pictures + self.rejected

    @property
    def cost(self) -> float | None:
        """The price of the device seconds."""
        return None if self.price is None else self.seconds / _HOUR * self.price

    def figures(self, total: int) -> str:
        """For a line of progress: per picture, and the cost of `total` rows at this rate."""
        made = max(self.pictures, 1)
        parts = [f"{self.calls / made:.1f} calls", f"{self.seconds / made:.3g} device s", f"{self.bytes / made:.0f} B"]
        line = f"{', '.join(parts)} a picture"
        if self.rejected:
            line += f"  {self.rejected} rejected"
        if self.cost is not None and self.rows:
            line += f"  cost {self.cost:.2f} of about {self.cost * total / self.rows:.2f}"
        return line

    def as_json(self) -> dict[str, Any]:
        """For bill.json."""
        made = max(self.pictures, 1)
        each = {"calls": self.calls / made, "seconds": self.seconds / made, "bytes": self.bytes / made}
        return {
            "pictures": self.pictures, "rejected": self.rejected, "calls": self.calls,
            "seconds": round(self.seconds, 3), "bytes": self.bytes, "per_picture": each,
            "price": self.price, "cost": self.cost,
        }  # fmt: skip
