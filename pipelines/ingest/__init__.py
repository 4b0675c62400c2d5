"""The ingest stage: pictures from folders, shards and tables become a verified, immutable dataset."""

from pipelines.ingest.page import show
from pipelines.ingest.stage import find, run

__all__ = ["find", "run", "show"]
