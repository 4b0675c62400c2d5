"""How many engines a model needs, by what they still have to do."""

from typing import Any

PENDING = "pending_calls"


class LoadPolicy:
    """Engines such that each has at most `calls_per_replica` denoiser calls to make.

    Ray Serve adds its bounds and delays, and starts the first engine of none as soon as a request waits.
    """

    def __init__(self, calls_per_replica: int) -> None:
        self.calls_per_replica = calls_per_replica

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """A context of Ray Serve's autoscaler -> engines wanted, not rounded, and no state."""
        loads = context.aggregated_metrics.get(PENDING, {})
        wanted = sum(loads.values()) / self.calls_per_replica
        # A request that waits at the door of engines that are all busy has no calls yet.
        return max(wanted, 1.0 if context.total_num_requests > 0 else 0.0), {}
