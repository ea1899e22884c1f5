"""Declare the command `refshard merge`."""

from pathlib import Path

import click

from stages import options

__all__ = ["merge"]


@click.command(short_help="Write a run's adapter and its base as one plain model.")
@click.argument("run_folder", metavar="RUN", type=options.EXISTING_FOLDER)
@click.argument("output", metavar="OUT", type=options.PATH)
@click.option(
    "--dtype",
    default="auto",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Dtype of the weights; auto: that of the base's checkpoint.",
)
@click.option(
    "--sample", default=8, type=click.IntRange(min=0), help="Number of pairs that both models score; 0 for none."
)
def merge(run_folder: Path, output: Path, dtype: str, sample: int) -> None:
    """Merge the adapter of RUN, a finished train.output_dir, into its base, and write one plain model to OUT.

    Tokenizer, chat template, generation config and card come along. Some of the run's pairs are scored by the unmerged
    and by the merged model. If their log-probs differ by more than rounding, nothing is written. The base's weights
    must fit the CPU's memory. A quantized base is dequantized first, in the memory of the GPU if there is one.
    """
    from stages.merge import command as stage

    stage.run(run_folder, output, dtype=dtype, sample=sample)
