"""Several policies trained on one set of shards, one after the other, and all of them on one page.

    stage one, once -> train each -> replies of each -> one page, one table

Every command runs in a process of its own, so that no two models are ever in memory. What is done already is not done
again: run the same command after a kill, or with more values.
"""

import dataclasses
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from pipeline.base.errors import ConfigError, StorageError, UnfinishedError
from pipeline.base.files import read_json
from pipeline.base.folders import open_folder
from pipeline.base.progress import emit
from pipeline.base.signals import StopFlag, watch_signals
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from pipeline.models.files import load_tokenizer
from pipeline.models.identity import differences, identity_of_run
from pipeline.replies.means import estimate_kl, estimate_reward
from pipeline.report.comparison import show_runs
from pipeline.report.pages import check_charts, write_page
from pipeline.report.run_page import report_page
from pipeline.run.reading import RECORD, Run, read_run
from pipeline.store.store import is_finished
from stages.subprocesses import run_command
from stages.sweep.grid import Member, make_grid

__all__ = [
    "Replies",
    "run",
]


@dataclass(frozen=True, kw_only=True)
class Replies:
    """What `refshard generate` is asked for of each run."""

    num_prompts: int
    """0: nothing"""
    max_tokens: int
    reward_model: str | None


def run(
    config_file: Path,
    overrides: Sequence[str],
    over: Sequence[str],
    *,
    replies: Replies,
    processes: int = 1,
    into: Path | None = None,
    debug: bool = False,
    stop_at: float | None = None,
) -> None:
    """Train every combination of the values, and compare what has come of them.

    A run that fails is reported, and the others go on, unless what it failed of (a wrong setting, a full disk) would
    befall them too.

    Args:
        config_file: The settings that all runs share.
        overrides: `key=value` on top of them.
        over: `key=value,value,...`: what the runs differ in.
        replies: What is generated at the end.
        processes: As which each stage runs.
        into: Folder of the runs' folders; `train.output_dir` if left out.
        debug: Have the commands show tracebacks.
        stop_at: When to stop, on `time.monotonic`'s clock.

    Raises:
        ConfigError: A setting is wrong, or a combination can't be served by the shards of the others.
        UnfinishedError: Asked to stop; all that was done is saved.
        click.exceptions.Exit: A run failed, which has said why; with the exit status of the first that did.
    """
    flag = watch_signals(stop_at)
    base = load_config(config_file, overrides)
    parent = into or base.train.folder
    runs = [_one_run(config_file, overrides, member, parent) for member in make_grid(over)]
    _check_served(base, runs, processes)
    drawn = _can_draw()
    for needed in ("stages.precompute", "stages.train"):
        importlib.import_module(needed)
    entry = importlib.import_module("stages.cli").run
    start = ["--debug"] if debug else []
    several = ["--processes", str(processes)] if processes > 1 else []

    def command(name: str, *words: str) -> int:
        return run_command(entry, [*start, name, *words], flag)

    if any(not one.moves for one in runs) and base.reference.declared is None and not _is_scored(base):
        words = ["--config", str(config_file), *_options(overrides)]
        if status := command("precompute", *words, *several):
            raise click.exceptions.Exit(status)
    trained: list[_OneRun] = []
    failures: dict[str, int] = {}
    for number, one in enumerate(runs, start=1):
        click.echo(f"\nRun {number} of {len(runs)}: {', '.join(one.member.overrides)}, in {one.folder}")
        status = command("train", "--config", str(config_file), *_options(one.overrides), *several)
        if status == 0:
            trained.append(one)
            # A reference that is known by name alone writes nothing.
            if replies.num_prompts and one.config.reference.declared is None:
                status = _generate(one, replies, command)
        if status:
            _note_failure(one, status, flag, failures)
    _compare([read_run(one.folder) for one in trained], parent, drawn=drawn)
    if failures:
        click.echo(
            f"{len(failures)} of {len(runs)} failed: "
            + ", ".join(f"{name} (exit status {status})" for name, status in failures.items())
            + ". The same command tries them again",
            err=True,
        )
        raise click.exceptions.Exit(next(iter(failures.values())))


@dataclass(frozen=True)
class _OneRun:
    """A member of the grid, with its settings."""

    member: Member
    config: Config
    overrides: tuple[str, ...]
    """All that is put on top of the file"""
    folder: Path

    @property
    def moves(self) -> bool:
        """Whether its reference moves, so that stage one runs between its windows."""
        return self.config.reference.sync is not None


def _one_run(config_file: Path, overrides: Sequence[str], member: Member, parent: Path) -> _OneRun:
    named = [text.partition("=")[0] for text in member.overrides]
    for key in named:
        if key == "train.output_dir":
            raise ConfigError("--over train.output_dir: a sweep names its runs' folders itself; --into says where")
        if key.partition(".")[0] in ("precompute", "cluster"):
            raise ConfigError(
                f"--over {key}: the runs share one stage one and one machine; set it in the file or by -o"
            )
    folder = parent / member.name
    together = (*overrides, *member.overrides, f"train.output_dir={json.dumps(str(folder))}")
    config = load_config(config_file, together)
    if config.reference.sync is not None:
        # The shards of the first window have the pairs of this run's first steps alone.
        together = (*together, f"precompute.output={json.dumps(str(folder / 'shards'))}")
        config = load_config(config_file, together)
    _ = config.train.options  # refuses a wrong field before anything runs
    return _OneRun(member, config, together, folder)


def _check_served(base: Config, runs: Sequence[_OneRun], processes: int) -> None:
    """Make sure that one set of shards serves all runs.

    Raises:
        ConfigError: Of a run another reference or tokenization would have to be scored.
    """
    shared = identity_of_run(base, load_tokenizer(base))
    for one in runs:
        what = f"--over {', '.join(one.member.overrides)}"
        if one.moves and processes > 1:
            raise ConfigError(f"--processes {processes}: {what} moves the reference, and such a run is one process")
        found = differences(shared, identity_of_run(one.config, load_tokenizer(one.config)), joining=True)
        if found:
            raise ConfigError(
                f"{what}: this run would need shards of its own, and a sweep has one set of them, scored with the "
                f"settings without --over. They would differ in {'; '.join(found)}"
            )
        if unscored := one.config.data.eval.keys() - base.data.eval.keys():
            raise ConfigError(
                f"{what}: the held-out set {min(unscored)} is not among those that are scored for all runs"
            )
    for i, one in enumerate(runs):
        twin = next((other for other in runs[:i] if _same_settings(one.config, other.config)), None)
        if twin is not None:
            names = f"{', '.join(twin.member.overrides)} and {', '.join(one.member.overrides)}"
            raise ConfigError(f"--over: {names} are the same settings")


def _same_settings(one: Config, other: Config) -> bool:
    def told(config: Config) -> object:
        own = dataclasses.replace(config.train, output_dir=None, given={})
        return config.data, config.policy, config.reference, config.loss, own, config.train.options

    return told(one) == told(other)


def _can_draw() -> bool:
    """Whether there will be a page; if not, it is said now and not after days."""
    try:
        check_charts()
    except ConfigError as error:
        click.echo(f"warning: there will be no page, only a table: {error}", err=True)
        return False
    return True


def _is_scored(config: Config) -> bool:
    output = open_folder(config.precompute.output)
    return all(is_finished(output.child(name)) for name in ("train", *config.data.eval))


def _options(overrides: Sequence[str]) -> list[str]:
    return [word for override in overrides for word in ("-o", override)]


def _generate(one: _OneRun, replies: Replies, command: Callable[..., int]) -> int:
    """Have a finished run's replies generated, unless they are there."""
    set_name = next(iter(one.config.data.eval), "train")
    if _has_replies(read_run(one.folder), replies, set_name, read_json(one.folder / RECORD)["step"]):
        return 0
    words = ["--set", set_name, "--prompts", str(replies.num_prompts), "--max-tokens", str(replies.max_tokens)]
    words += ["--temperature", str(_TEMPERATURE), "--seed", str(_SEED)]
    if replies.reward_model is not None:
        words += ["--reward-model", replies.reward_model]
    return command("generate", str(one.folder), *words)


_TEMPERATURE, _SEED = 1.0, 0
"""Of all runs' replies: at 1 they estimate the KL without bias, and a shared seed makes them comparable"""


def _has_replies(run: Run, replies: Replies, set_name: str, step: int) -> bool:
    """Whether a run's replies are those that are asked for, not ones of another policy, set or way of drawing."""
    asked = (step, set_name, replies.num_prompts, replies.max_tokens, _TEMPERATURE, _SEED, replies.reward_model)
    there = {
        (g.step, g.set_name, g.num_prompts, g.max_tokens, g.temperature, g.seed, g.reward_by) for g in run.generations
    }
    return there == {asked}


# A wrong setting, no space left, a request to stop, Ctrl-C: the next run would end alike.
_ENDS_ALL = (ConfigError.exit_status, StorageError.exit_status, UnfinishedError.exit_status, 130)


def _note_failure(one: _OneRun, status: int, flag: StopFlag, failures: dict[str, int]) -> None:
    if status in _ENDS_ALL or flag:
        click.echo(f"The sweep ends with {one.member.name}; the same command goes on with it", err=True)
        raise click.exceptions.Exit(status)
    click.echo(f"{one.member.name} failed with exit status {status}; the sweep goes on with the next run", err=True)
    failures[one.member.name] = status


def _compare(runs: Sequence[Run], parent: Path, *, drawn: bool) -> None:
    """Print the table of all finished runs, and write their page."""
    if not runs:
        return
    rows = [_row(shown.name, shown.run) for shown in show_runs(runs)]
    emit("sweep", {"runs": rows})
    # What no run has is left out.
    header = [name for name in rows[0] if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in header}
    click.echo()
    for row in ({name: name for name in header}, *rows):
        first, *others = header
        click.echo("  ".join([row[first].ljust(widths[first]), *(row[name].rjust(widths[name]) for name in others)]))
    click.echo()
    if drawn:
        page = parent / "sweep.html"
        write_page(page, report_page(runs))
        click.echo(f"{len(runs)} runs in {page}")


def _row(name: str, run: Run) -> dict[str, str]:
    """What a run has come to, on its first held-out set; on the last pairs of training where it has none."""
    pairs, prefix = next(iter(run.held_out().items()), ("train", ""))

    def last(metric: str) -> str:
        value = run.curve(prefix + metric).last
        return "" if value is None else f"{value:.4g}"

    reward = estimate_reward(run.generations, "policy")
    return {
        "run": name,
        "steps": f"{run.step:,}",
        "pairs of": pairs,
        "loss": last("loss"),
        "accuracy": last("rewards/accuracies"),
        "margin": last("rewards/margins"),
        "KL, nats": str(estimate_kl(run.generations)) if run.generations else "",
        "reward": "" if reward is None else str(reward),
    }
