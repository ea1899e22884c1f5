"""Declare the command `refshard export`."""

from pathlib import Path

import click

from pipeline.config.schema import Config
from stages import options

__all__ = ["export"]


@click.command(short_help="Write the data with reference log-probs, for other trainers.")
@click.argument("output", type=options.PATH)
@options.with_config
@click.option(
    "--format",
    "form",
    default="datasets",
    type=click.Choice(["datasets", "fairseq2", "open-instruct"]),
    help="Form of OUTPUT: a datasets folder, fairseq2's JSON Lines, or open-instruct's file of reference log-probs.",
)
@click.option(
    "--tokenized",
    type=options.EXISTING_FOLDER,
    metavar="DIR",
    help="Folder of the tokenized dataset that open-instruct wrote; --format open-instruct needs it.",
)
def export(output: Path, config: Config, form: str, tokenized: Path | None) -> None:
    """Write the reference's log-probs to OUTPUT, for other trainers.

    A datasets folder and fairseq2's lines hold the data too, with the log-probs as columns: ref_chosen_logps and
    ref_rejected_logps, or reference_score_chosen and reference_score_rejected. open-instruct's file holds the log-probs
    alone, in the order of the dataset that --tokenized names.
    """
    from stages.export import command as stage

    stage.run(config, output, form=form, tokenized=tokenized)
