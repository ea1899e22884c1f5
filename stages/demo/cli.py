"""The commands of the embedded default. The stage is imported when one is called, so that help does not load torch."""

from pathlib import Path

import click

from pipeline.config.schema import Config
from stages import options
from stages.options import EXISTING_FOLDER, FOLDER

__all__ = ["demo"]


@click.group(short_help="Prepare the embedded default run, or summarize it.")
def demo() -> None:
    """The embedded default: a tiny model and preferences whose true reward is known."""


@demo.command("prepare")
@click.argument("folder", type=FOLDER)
@click.option("--seed", default=0, help="Seed of the corpus, the model and the pairs.")
def demo_prepare(folder: Path, seed: int) -> None:
    """Make the tiny model and its preference pairs in FOLDER, unless they exist."""
    from stages.demo import command as stage

    stage.prepare(folder, seed=seed)


@demo.command("summary")
@click.argument("folder", type=EXISTING_FOLDER)
@options.with_config
def demo_summary(folder: Path, config: Config) -> None:
    """Compare the trained policy with the model and the true reward in FOLDER."""
    from stages.demo import command as stage

    stage.summary(folder, config)
