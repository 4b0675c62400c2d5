"""The serve stage: Ray Serve deployments that generate, inpaint and denoise behind OpenAI's images API."""

from pipelines.serve.stage import build, find, run, start, stop

__all__ = ["build", "find", "run", "start", "stop"]
