"""What a training run tells Prometheus, through Ray's own exporter: the figures that TensorBoard shows, as of now."""

from ray.util.metrics import Gauge

# By the names that TensorBoard shows them under.
_METRICS = {
    "step": ("diffusion_train_step", "Optimisation steps that are done."),
    "steps left": ("diffusion_train_steps_left", "Optimisation steps still to do."),
    "loss": ("diffusion_train_loss", "Training loss, mean of the last steps."),
    "held-out loss": ("diffusion_train_heldout_loss", "Loss on the held-out pictures at the last look."),
    "gradient norm": ("diffusion_train_gradient_norm", "Norm of the last gradient, before clipping."),
    "pictures a second": ("diffusion_train_pictures_per_second", "Pictures a second, over all workers."),
    "data wait share": ("diffusion_train_data_wait_share", "Share of the time that the first worker waits for data."),
    "memory bytes": ("diffusion_train_memory_bytes", "Peak memory of the first worker: its GPU's, else resident."),
    "checkpoint seconds": ("diffusion_train_checkpoint_seconds", "Time of the last checkpoint on its way out."),
}  # fmt: skip


class TrainMetrics:
    """Figures of one run, by the name of its model."""

    def __init__(self, model: str) -> None:
        self.gauges = {shown: Gauge(name, about, ("model",)) for shown, (name, about) in _METRICS.items()}
        for gauge in self.gauges.values():
            gauge.set_default_tags({"model": model})

    def tell(self, values: dict[str, float]) -> None:
        """Set those of the figures that Prometheus has, by the names that TensorBoard shows."""
        for name in self.gauges.keys() & values.keys():
            self.gauges[name].set(values[name])
