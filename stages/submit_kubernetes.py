"""Manifests for Kubernetes: stage one as an Indexed Job, stage two as a Job, the volume that they share."""

from pathlib import Path

from pipeline.config import Config

__all__ = ["run"]


def run(config: Config, *, workers: int | None = None, into: Path | None = None, submit: bool = False) -> None:
    """Write the manifests; submit them if asked to."""
    raise NotImplementedError
