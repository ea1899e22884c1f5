"""Declare the command `refshard import`."""

from pathlib import Path
from typing import Any

import click

from pipeline.config.schema import Config
from stages import options

__all__ = ["import_"]


@click.command("import", short_help="Read reference log-probs from a file.")
@click.argument("scores", type=options.PATH)
@options.with_config
@options.SET
@click.option("--chosen", default="ref_chosen_logps", help="Column with the log-probs of the chosen completions.")
@click.option("--rejected", default="ref_rejected_logps", help="Column with the log-probs of the rejected completions.")
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    metavar="N",
    help="Score N pairs here too and report the differences; by default 8 for an engine's answers, else 0.",
)
@click.option("--overwrite", is_flag=True, help="Delete the existing store and start over.")
def import_(scores: Path, config: Config, **given: Any) -> None:
    """Write the log-probs in SCORES, a Parquet or JSON Lines file, as shards.

    SCORES has the columns of the pairs, as `data` describes them, and two more. These hold a number for each completion
    (the sum over its tokens), a list (one number for each token), or the answer of vLLM or SGLang to prompt and
    completion, with the log-probs of the prompt's tokens. The section `reference` names the model that gave them; if it
    can't be loaded here, reference.declared gives it a name.
    """
    from stages.import_scores import command as stage

    stage.run(config, scores, **given)
