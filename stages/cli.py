"""The `refshard` command. Each stage is imported when it is called, so that help does not load torch."""

import io
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from pipeline.base.errors import ConfigError, one_line, status_and_text
from pipeline.base.progress import emit, say, say_loading
from pipeline.base.quiet import silence_libraries
from pipeline.base.signals import watch_signals
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from stages import options
from stages.check.hardware import HARDWARE, hardware_named
from stages.demo.cli import demo
from stages.env import show_environment
from stages.export.cli import export
from stages.import_scores.cli import import_
from stages.merge.cli import merge
from stages.options import AT_LEAST_1, EXISTING_FOLDER, FILE, FOLDER, PATH
from stages.recipes.command import recipes
from stages.schema import show_schema
from stages.subprocesses import Commands, leave

__all__ = ["main", "run"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="refshard")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """DPO in two offline stages: score the reference once, then train the policy alone.

    \b
    refshard precompute --config run.yaml     reference log-probs into Parquet shards
    refshard train --config run.yaml          DPO on batches joined with those shards
    refshard check --config run.yaml          rows, tokens, time, memory and disk, before a GPU is booked
    refshard inspect runs/shards              what the shards hold
    refshard verify runs/shards               checks that they are complete and undamaged
    refshard sweep --over loss.beta=0.1,0.5   several policies on the same shards
    refshard generate runs/policy             replies of policy and reference, and the KL between them
    refshard merge runs/policy OUT            an adapter and its base as one plain model
    refshard report runs/policy               one page of a run's results; several runs: side by side
    refshard explain --config run.yaml --row 7   one pair: its tokens, what is scored, each log-prob
    refshard import FILE --config run.yaml    reference log-probs from a file, also of vLLM and SGLang
    refshard export DIR --config run.yaml     reference log-probs for TRL, fairseq2, open-instruct
    refshard submit slurm --config run.yaml   both stages as jobs; also: submit k8s
    refshard recipes                          ready settings; recipes copy NAME puts one here
    refshard schema                           the settings' JSON schema, for editors
    refshard env                              versions and devices, for a bug report

    Exit status: 0 done; 2 wrong command or settings; 65 bad data or a damaged file; 74 disk or network;
    75 saved but unfinished, run again; 78 other reference or tokenization than the shards';
    79 another attempt of this run has taken over; 130 Ctrl-C before anything began, or pressed twice; 1 a bug.
    """


@main.command()
@options.with_config
@click.option(
    "--worker",
    type=options.parse_worker,
    default="0/1",
    metavar="I/N",
    help="Score share I of N; I counts from 0. The workers share only the output folder.",
)
@options.PROCESSES
@options.STOP_AFTER
@options.JSON_LINES
@click.option("--overwrite", is_flag=True, help="Delete the shards in the output folder and start over.")
def precompute(config: Config, processes: int, **given: Any) -> None:
    """Stage one: write the reference's log-probs to shards.

    It scores only what is missing: after a kill, run it again, with any number of workers. With --processes, each
    process is a worker of its own; with precompute.tp_plan, all of them hold one reference together.
    """
    from stages import early, finished

    early.refuse_early(config)
    if processes > 1:
        _launch(config, processes)
        return
    if given["overwrite"] or not finished.reported_stores(config):
        say_loading()
        from stages.precompute import command as stage

        stage.run(config, **given)


@main.command(short_help="Stage two: train the policy on the shards.")
@options.CONFIG
@options.OVERRIDES
@options.PROCESSES
@options.STOP_AFTER
@options.JSON_LINES
@click.option("--overwrite", is_flag=True, help="Delete the checkpoints in the output folder and start over.")
@click.option("--one-window", is_flag=True, help="With reference.sync: train until the reference moves, then exit.")
def train(config_file: Path, overrides: tuple[str, ...], processes: int, one_window: bool, **given: Any) -> None:
    """Stage two: train the policy on the shards, with no reference in memory.

    It resumes from the run's newest complete checkpoint, if there is one. With reference.sync (TR-DPO), it alternates
    with stage one, each in its own process, until the run is finished.
    """
    from stages import early, finished

    config = load_config(config_file, overrides)
    early.refuse_early(config, is_scored=True)
    if not given["overwrite"]:
        early.refuse_other_settings(config, processes)
    if processes > 1:
        _launch(config, processes)
        return
    if config.reference.sync is not None and not one_window:
        from stages import trdpo

        words = ["--config", str(config_file), *(word for override in overrides for word in ("-o", override))]
        trdpo.run(config, _commands(given["stop_at"]), words, overwrite=given["overwrite"])
        return
    if given["overwrite"] or not finished.reported_run(config):
        say_loading()
        from stages import train as stage

        stage.run(config, **given)


_SHARE = click.FloatRange(0, 1)


@main.command(short_help="Check data and settings; estimate memory and time.")
@options.with_config
@click.option(
    "--hardware",
    default="here",
    metavar="NAME",
    help=f"Hardware of the run: {', '.join(HARDWARE)}, or an amount of memory (24GB), each with a number in front for "
    "several (8xh100-80gb); cpu; or here, for this machine.",
)
@click.option("--rows", type=AT_LEAST_1, metavar="N", help="Read only the first N rows of each set.")
@click.option("--max-dropped", type=_SHARE, metavar="SHARE", help="Fail if a larger share of rows is dropped: 0.05.")
@click.option("--max-cut", type=_SHARE, metavar="SHARE", help="Fail if a larger share of pairs is cut.")
@click.option(
    "--max-memory", type=options.parse_memory, metavar="SIZE", help="Fail if a stage needs more GPU memory: 24GB."
)
@click.option("--max-hours", type=click.FloatRange(min=0), metavar="H", help="Fail if both stages take longer.")
@options.JSON
def check(config: Config, hardware: str, rows: int | None, as_json: bool, **limits: Any) -> None:
    """Report kept and dropped rows, the time and memory of both stages, and the units that stage one has done.

    It needs no GPU and loads no weights. If shards exist, it reads all weight files once, for their digests; this takes
    a while for a large model. Times for a named GPU are assumed from its data sheet. Exit status: 0 nothing is wrong;
    65 rows are bad, or too many are dropped or cut; 2 the settings are impossible, or need more than allowed; 78 the
    existing shards are of another reference.
    """
    from stages import early

    early.refuse_early(config)
    if hardware not in ("here", "cpu"):
        hardware_named(hardware)  # refuses a wrong name before the libraries load
    say_loading()
    from stages.check import command as stage

    stage.run(config, hardware=hardware, rows=rows, limits=stage.Limits(**limits), as_json=as_json)


@main.command(short_help="Train several policies on one set of shards.")
@options.CONFIG
@options.OVERRIDES
@click.option(
    "--over",
    multiple=True,
    required=True,
    metavar="KEY=V1,V2,...",
    help="A setting and its values, like loss.beta=0.05,0.1,0.5. Repeatable: every combination is run.",
)
@options.PROCESSES
@click.option(
    "--into", type=FOLDER, metavar="DIR", help="Folder for the runs and sweep.html; if left out, train.output_dir."
)
@click.option(
    "--prompts",
    "num_prompts",
    default=128,
    type=click.IntRange(min=0),
    help="Number of prompts to reply to at the end, for rewards and KL; 0 for none.",
)
@options.MAX_TOKENS
@options.REWARD_MODEL
@options.STOP_AFTER
@options.JSON_LINES
def sweep(stop_at: float | None, **given: Any) -> None:
    """Train a policy for every combination of values, all on the same shards, and compare them on one page.

    If the shards are not complete, stage one runs first. Each run has a folder of its own, named by its values
    (DIR/beta-0.1). The same command does only what is missing. A run that fails does not stop the others.
    """
    from stages.sweep import command as stage

    stage.run(stage.Sweep(**given), _commands(stop_at))


@main.command(short_help="Let a run's policy and reference reply to prompts.")
@click.argument("run_folder", metavar="RUN", type=EXISTING_FOLDER)
@click.option(
    "--prompts",
    "num_prompts",
    default=128,
    type=AT_LEAST_1,
    help="Number of prompts. A few show what changed; a few hundred give a comparable KL.",
)
@click.option(
    "--set", "set_name", metavar="NAME", help="Set of the prompts; if left out, the first held-out one, else train."
)
@options.MAX_TOKENS
@click.option(
    "--temperature",
    default=1.0,
    type=click.FloatRange(min=0),
    help="Temperature; the estimated KL is unbiased at 1 alone. 0: the likeliest token.",
)
@click.option("--seed", default=0, help="Seed of the random numbers, which both models share.")
@options.REWARD_MODEL
@options.STOP_AFTER
@options.JSON_LINES
def generate(run_folder: Path, max_tokens: int, temperature: float, seed: int, **given: Any) -> None:
    """Let policy and reference of RUN, a train.output_dir, reply to prompts of the run's own data.

    It writes generations.jsonl in RUN: both replies to each prompt, their log-probs under both models and, with
    --reward-model, their rewards. `refshard report` shows them. The policy of an unfinished run is its newest complete
    checkpoint. One model is in memory at a time. Replies are drawn without top-k and top-p, even if the model's folder
    sets them.
    """
    from stages import early

    early.settings_of_run(run_folder, given["set_name"])
    say_loading()
    from pipeline.replies.sampling import Sampling
    from stages import generate as stage

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    stage.run(run_folder, sampling=sampling, **given)


@main.command(short_help="Check that shards are complete and undamaged.")
@click.argument("shards")
@click.option("--model", help="Also score some pairs again with this model, which must be the reference.")
@click.option("--sample", default=64, type=AT_LEAST_1, help="Number of pairs that --model scores again.")
@click.option("--clean", is_flag=True, help="Delete temporary files of killed writers that are more than an hour old.")
def verify(shards: str, **given: Any) -> None:
    """Check SHARDS, a store or a folder of stores (also s3://...): completeness, digests, fingerprint, rows, sums.

    It prints every fault. Exit status: 0 complete; 75 undamaged so far, but unfinished; 65 damaged; 78 of another run.
    """
    from stages import verify as stage

    stage.run(shards, **given)


@main.command(short_help="Show what shards hold.")
@click.argument("shards")
@options.JSON
@click.option("--html", "page", type=FILE, metavar="FILE", help="Also write a page with charts, which opens from disk.")
def inspect(shards: str, as_json: bool, page: Path | None) -> None:
    """Show what SHARDS, a store or a folder of stores (also s3://...), holds.

    It shows the reference, counts, lengths, how the reference itself ranks the pairs, and pairs to look at: likely
    mislabelled, duplicate, likely swapped. Exit status: 75 if shards are unfinished; the parts so far are shown.
    """
    from stages import inspect as stage

    stage.run(shards, as_json=as_json, page=page)


@main.command(short_help="Write one page about a run, or about several.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PATH)
@click.option(
    "--output",
    type=FILE,
    metavar="FILE",
    help="File of the page; if left out, report.html in RUN, or in the folder that holds all runs.",
)
def report(runs: tuple[Path, ...], output: Path | None) -> None:
    """Write a page about RUN, the folder of a run (train.output_dir), finished or unfinished.

    It shows loss, rewards, margins, accuracy, KL, held-out curves, replies, data, identity and cost. Several runs share
    one page, labelled by the settings that differ. The page is one file of some 5 MB and needs no network.
    """
    from stages import report as stage

    stage.run(runs, output=output)


@main.command(short_help="Show one pair as the models see it.")
@options.with_config
@click.option("--row", required=True, type=click.IntRange(min=0), help="Position in the data, from 0.")
@options.SET
@click.option("--no-model", is_flag=True, help="Show stored log-probs only; load no reference.")
@click.option(
    "--policy",
    type=EXISTING_FOLDER,
    metavar="DIR",
    help="Also score with the policy of a run's folder or a checkpoint.",
)
@click.option("--html", type=FILE, metavar="FILE", help="Also write a page.")
@options.JSON
@click.option("--full", is_flag=True, help="Print the whole prompt, even if it is long.")
@click.option(
    "--color/--no-color",
    "colors",
    default=None,
    help="Colour tokens, or print tables; by default colours in a terminal.",
)
def explain(config: Config, row: int, set_name: str, no_model: bool, policy: Path | None, **view: Any) -> None:
    """Show one pair as the models see it: its tokens, which of them are scored, what is cut, why it is dropped.

    Each scored token has its log-prob: the stored one, and the one that the reference gives now. In a terminal and on a
    page, the token's colour shows it. --policy also shows how far training has moved the log-prob of each token.
    """
    from stages.explain import command as stage

    recompute, shown = not no_model, stage.View(**view)
    stage.run(config, row=row, set_name=set_name, recompute=recompute, policy=policy, view=shown)


@main.group(short_help="Make job files for a scheduler.")
def submit() -> None:
    """Make the job files of both stages for a scheduler, and submit them with --submit.

    The section `cluster` has the resources of the jobs; -o cluster.partition=gpu sets one of them.
    """


@submit.command("slurm", short_help="Job files for Slurm.")
@options.WORKERS
@options.with_config
@options.INTO
@click.option("--submit", is_flag=True, help="Submit the jobs to Slurm.")
def submit_slurm(config: Config, **given: Any) -> None:
    """Write job files: stage one as a Slurm array, a check that nothing is missing, stage two, one after the other."""
    from stages.submit import slurm as stage

    stage.run(config, **given)


@submit.command("k8s", short_help="Manifests for Kubernetes.")
@options.WORKERS
@options.with_config
@options.INTO
@click.option("--submit", is_flag=True, help="Submit the jobs to Kubernetes (kubectl).")
def submit_kubernetes(config: Config, **given: Any) -> None:
    """Write manifests: stage one as a Kubernetes Indexed Job, stage two as a Job, and the volume that they share."""
    from stages.submit import kubernetes as stage

    stage.run(config, **given)


main.add_command(demo)
main.add_command(export)
main.add_command(import_)
main.add_command(merge)
main.add_command(recipes)
main.add_command(show_environment)
main.add_command(show_schema)


def _launch(config: Config, processes: int) -> None:
    """Run this command in several processes."""
    if config.reference.sync is not None:
        raise ConfigError(f"--processes {processes}: a run whose reference moves (reference.sync) is one process")
    from stages import launch

    # Of an option that is given twice, the last value counts.
    launch.run(run, processes, [*sys.argv[1:], "--processes=1"])


def _commands(stop_at: float | None) -> Commands:
    """Give the command line to a stage that runs commands in other processes."""
    return Commands(entry=run, flag=watch_signals(stop_at), debug="--debug" in sys.argv)


def run() -> None:
    """Run the command; end with its exit status, and one line for an error."""
    debug = "--debug" in sys.argv[1:]
    # Imports ask for GPUs. torch's usual way of asking initializes CUDA, and forks of this process could not use them
    # (see torch.cuda.is_available).
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    silence_libraries()
    if not sys.stderr.isatty():
        # The libraries' bars are carriage returns, which a log keeps in one line.
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    # A Linux path may not be text, and showing it must not end the run. A job's log is read while the job runs.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        status = main.main(standalone_mode=False)
    except click.ClickException as error:
        error.show(shown := io.StringIO())
        say(shown.getvalue().rstrip("\n"), err=True)
        status = error.exit_code
        emit("error", {"text": one_line(error.format_message()), "status": status})
    except click.exceptions.Exit as error:
        status = error.exit_code
    except click.exceptions.Abort:
        say("refshard: interrupted", err=True)
        status = 130
    except Exception as error:
        # While a loader is dead, torch's handler raises an error whenever another process ends.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if debug:
            traceback.print_exc()
        status, text = status_and_text(error)
        say(f"refshard: {text}", err=True)
        emit("error", {"text": text, "status": status})
    leave(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    run()
