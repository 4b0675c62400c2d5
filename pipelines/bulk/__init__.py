"""The generate stage: a table of requests becomes image shards, each a pure function of the model and its rows."""

from pipelines.bulk.estimate import rehearse
from pipelines.bulk.page import show
from pipelines.bulk.stage import find, run

__all__ = ["find", "rehearse", "run", "show"]
