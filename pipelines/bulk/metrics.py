"""What a bulk job tells Prometheus, through Ray's own exporter: its bill so far."""

from ray.util.metrics import Gauge

from pipelines.bulk.bill import Bill


class BulkMetrics:
    """Figures of one job, by its name; of shards that are committed, those of earlier runs among them."""

    def __init__(self, job: str) -> None:
        self.done = Gauge("diffusion_bulk_rows_done", "Rows that are settled: made, or rejected.", ("job",))
        self.left = Gauge("diffusion_bulk_rows_left", "Rows still to make.", ("job",))
        self.rejected = Gauge("diffusion_bulk_rows_rejected", "Rows that could not be made.", ("job",))
        self.calls = Gauge("diffusion_bulk_denoiser_calls", "Denoiser calls that the rows took.", ("job",))
        self.seconds = Gauge("diffusion_bulk_device_seconds", "Seconds that devices have worked.", ("job",))
        self.bytes = Gauge("diffusion_bulk_bytes", "Bytes of the pictures that were written.", ("job",))
        for gauge in (self.done, self.left, self.rejected, self.calls, self.seconds, self.bytes):
            gauge.set_default_tags({"job": job})

    def tell(self, bill: Bill, rows: int) -> None:
        """Set all figures, of a job of so many rows."""
        self.done.set(bill.rows)
        self.left.set(rows - bill.rows)
        self.rejected.set(bill.rejected)
        self.calls.set(bill.calls)
        self.seconds.set(bill.seconds)
        self.bytes.set(bill.bytes)
