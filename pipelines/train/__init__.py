"""The train stage: Ray Train runs one process per device; the store holds the truth that it resumes from."""

from pipelines.train.loop import train_on_rank
from pipelines.train.publication import show
from pipelines.train.session import Host
from pipelines.train.stage import find, run

__all__ = ["Host", "find", "run", "show", "train_on_rank"]
