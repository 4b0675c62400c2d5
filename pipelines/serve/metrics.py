"""What a service tells Prometheus, through Ray's own exporter."""

from dataclasses import dataclass

from ray.util.metrics import Counter, Gauge, Histogram

from pipelines.worker.loop import Tick

_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0]
_TICKS = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]


class EngineMetrics:
    """Figures of one engine, by model."""

    def __init__(self, model: str) -> None:
        tags = {"model": model}
        self.queue = Gauge("diffusion_queue", "Pictures that wait for an engine.", ("model",))
        self.pending = Gauge("diffusion_pending_calls", "Denoiser calls still to make.", ("model",))
        self.lanes = Gauge("diffusion_lanes", "Requests in the last tick.", ("model",))
        self.tick = Histogram("diffusion_tick_seconds", "Time of a tick.", _TICKS, ("model",))
        self.calls = Counter("diffusion_denoiser_calls", "Denoiser calls made for requests.", ("model",))
        self.ended = Counter("diffusion_engine_pictures", "Pictures that an engine ended.", ("model",))
        for metric in (self.queue, self.pending, self.lanes, self.tick, self.calls, self.ended):
            metric.set_default_tags(tags)

    def tell(self, tick: Tick) -> None:
        """Count a tick."""
        self.queue.set(tick.queued)
        self.pending.set(tick.pending_calls)
        self.lanes.set(tick.calls)
        self.tick.observe(tick.seconds)
        if tick.calls:
            self.calls.inc(tick.calls)
        if tick.ended:
            self.ended.inc(tick.ended)


@dataclass(frozen=True)
class Asked:
    """What a request was: the labels of its figures."""

    model: str
    task: str

    @property
    def tags(self) -> dict[str, str]:
        """As Prometheus has them."""
        return {"model": self.model, "task": self.task}


class RequestMetrics:
    """Figures of requests, by model and task."""

    def __init__(self) -> None:
        tags = ("model", "task")
        self.pictures = Counter("diffusion_pictures", "Pictures that were answered.", tags)
        self.seconds = Histogram("diffusion_request_seconds", "Time of an answered request.", _SECONDS, tags)
        self.preview = Histogram("diffusion_first_preview_seconds", "Time to the first preview.", _SECONDS, tags)
        self.refused = Counter("diffusion_refusals", "Requests without an answer.", (*tags, "reason"))
        self.retried = Counter("diffusion_retries", "Tries after an engine died.", ("model",))

    def answered(self, asked: Asked, pictures: int, seconds: float) -> None:
        """Count an answer."""
        self.pictures.inc(pictures, asked.tags)
        self.seconds.observe(seconds, asked.tags)

    def previewed(self, asked: Asked, seconds: float) -> None:
        """Count a first preview."""
        self.preview.observe(seconds, asked.tags)

    def refuse(self, asked: Asked, reason: str) -> None:
        """Count a refusal."""
        self.refused.inc(1, {**asked.tags, "reason": reason})

    def retry(self, model: str) -> None:
        """Count a try more."""
        self.retried.inc(1, {"model": model})
