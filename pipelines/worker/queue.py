"""Who is next: requests that wait for a place in the engine, fair between those who send them."""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from diffusion_core.engine import Priority

T = TypeVar("T", bound=Hashable)
PRIORITIES: tuple[Priority, Priority] = ("interactive", "bulk")


@dataclass
class _Line:
    """What one sender waits for, and the cost of what was let in for it so far."""

    spent: float = 0.0
    waiting: deque[tuple[T, float]] = field(default_factory=deque)  # type: ignore[valid-type]


class FairQueue(Generic[T]):
    """Items of several senders, each sender's in order; whose share so far is the smallest is next.

    It takes `limit` items of a priority. When it is full a sender may still put in what its fair part of the limit
    holds, so that one who fills the queue shuts nobody out; there are never more than two limits of items.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lines: dict[Priority, dict[str, _Line]] = {priority: {} for priority in PRIORITIES}

    def __len__(self) -> int:
        return sum(self.count(priority) for priority in PRIORITIES)

    def items(self) -> list[T]:
        """All items, in no order that matters."""
        return [item for lines in self._lines.values() for line in lines.values() for item, _ in line.waiting]

    def count(self, priority: Priority) -> int:
        """Items that wait."""
        return sum(len(line.waiting) for line in self._lines[priority].values())

    def has_room(self, priority: Priority, sender: str, count: int) -> bool:
        """Whether `count` more items of a sender may wait."""
        lines = self._lines[priority]
        if self.count(priority) + count <= self.limit:
            return True
        own = len(lines[sender].waiting) if sender in lines else 0
        senders = len(lines) + (sender not in lines)
        return own + count <= self.limit // senders and self.count(priority) + count <= 2 * self.limit

    def put(self, priority: Priority, sender: str, item: T, cost: float) -> None:
        """Let an item wait. A sender that was away starts level with the least served, and claims no past."""
        lines = self._lines[priority]
        if sender not in lines:
            lines[sender] = _Line(min((line.spent for line in lines.values()), default=0.0))
        lines[sender].waiting.append((item, cost))

    def first(self, priority: Priority) -> T | None:
        """Who is next; None where nobody waits."""
        line = self._next(priority)
        return line.waiting[0][0] if line else None

    def take(self, priority: Priority) -> None:
        """Let in who is next."""
        line = self._next(priority)
        if line is None:
            raise IndexError(f"{priority}: nobody waits")
        _, cost = line.waiting.popleft()
        line.spent += cost
        self._forget_empty(priority)

    def drop(self, item: T) -> bool:
        """Take an item out; False where it does not wait."""
        for priority in PRIORITIES:
            for line in self._lines[priority].values():
                kept = [each for each in line.waiting if each[0] != item]
                if len(kept) < len(line.waiting):
                    line.waiting = deque(kept)
                    self._forget_empty(priority)
                    return True
        return False

    def _next(self, priority: Priority) -> _Line | None:
        """The line of the sender that was let in least."""
        return min(self._lines[priority].values(), key=lambda line: line.spent, default=None)

    def _forget_empty(self, priority: Priority) -> None:
        """Senders that wait for nothing have no line."""
        lines = self._lines[priority]
        for sender in [sender for sender, line in lines.items() if not line.waiting]:
            del lines[sender]
