"""The evaluate stage: how good a model's pictures are, and what it can do with others."""

from pipelines.evaluate.page import show
from pipelines.evaluate.stage import find, run

__all__ = ["find", "run", "show"]
