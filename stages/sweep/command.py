"""Train several policies on one set of shards, one after the other, and compare them on one page.

    stage one, once -> train each -> replies of each -> one page, one table

Every command runs in a process of its own, so one model at a time is in memory. The same command, after a kill or with
more values, does only what is missing.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from pipeline.base.errors import ConfigError, StorageError, UnfinishedError
from pipeline.base.folders import open_folder
from pipeline.base.progress import emit, say, say_loading
from pipeline.base.tables import aligned
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from pipeline.models.files import load_tokenizer
from pipeline.models.identity import differences, identity_of_run
from pipeline.replies.means import estimate_kl, estimate_reward
from pipeline.report.comparison import show_runs
from pipeline.report.pages import check_charts, check_page, write_page
from pipeline.report.run_page import report_page
from pipeline.run.reading import Run, read_record, read_run
from pipeline.store.store import is_finished
from stages.early import refuse_early
from stages.subprocesses import Commands, import_libraries
from stages.sweep.grid import Member, make_grid

__all__ = ["Sweep", "run"]

_PAGE = "sweep.html"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep as the command line asks for it."""

    config_file: Path
    overrides: Sequence[str]
    """`key=value` of all runs, on top of the file"""
    over: Sequence[str]
    """`key=value,value,...`: the differences between the runs"""
    num_prompts: int
    """Number of prompts that each policy replies to; 0: none"""
    max_tokens: int
    reward_model: str | None = None
    processes: int = 1
    """Number of processes of each stage"""
    into: Path | None = None
    """Folder of the runs' folders; `train.output_dir` if left out"""

    def words(self, overrides: Sequence[str]) -> list[str]:
        """Give the options of a stage's command."""
        several = ["--processes", str(self.processes)] if self.processes > 1 else []
        options = [word for override in overrides for word in ("-o", override)]
        return ["--config", str(self.config_file), *options, *several]


def run(sweep: Sweep, commands: Commands) -> None:
    """Train every combination of the values, and compare the policies.

    A run that fails is reported, and the others continue. If its cause (a wrong setting, a full disk) would fail them
    too, the sweep ends.

    Raises:
        ConfigError: A setting is wrong, or a combination can't use the shards of the others.
        UnfinishedError: Stopped as asked; all that was done is saved.
        click.exceptions.Exit: A run failed and has said why; with the exit status of the first that failed.
    """
    base = load_config(sweep.config_file, sweep.overrides)
    parent = sweep.into or base.train.folder
    runs = [_one_run(sweep, member, parent) for member in make_grid(sweep.over)]
    say_loading()
    _check_served(base, runs, sweep.processes)
    # Imported here: the module loads torch, and a wrong setting is answered without it.
    from pipeline.training.arguments import refused_here

    for one in runs:
        if error := refused_here(one.config):
            raise error
    drawn = True
    try:
        # Now, instead of after days.
        check_charts()
    except ConfigError as error:
        say(f"warning: there will be no page, only a table: {error}", err=True)
        drawn = False
    if drawn:
        check_page(parent / _PAGE)
    import_libraries()
    # A reference that moves has shards of each window.
    if base.reference.declared is None and any(one.config.reference.sync is None for one in runs):
        output = open_folder(base.precompute.output)
        is_scored = all(is_finished(output.child(name)) for name in base.data.names)
        if not is_scored and (status := commands.run("precompute", *sweep.words(sweep.overrides))):
            raise click.exceptions.Exit(status)
    trained: list[_OneRun] = []
    failures: dict[str, int] = {}
    for number, one in enumerate(runs, start=1):
        say(f"\nRun {number} of {len(runs)}: {one.values}, in {one.folder}")
        status = commands.run("train", *sweep.words(one.overrides))
        if status == 0:
            trained.append(one)
            # A reference that is known by name alone can't generate.
            if sweep.num_prompts and one.config.reference.declared is None:
                status = _generate(one, sweep, commands)
        if status in _ENDS_ALL or (status and commands.flag):
            say(f"The sweep ends with {one.folder.name}; the same command resumes with it", err=True)
            raise click.exceptions.Exit(status)
        if status:
            say(f"{one.folder.name} failed with exit status {status}; the next run follows", err=True)
            failures[one.folder.name] = status
    _compare([read_run(one.folder) for one in trained], parent, drawn=drawn)
    if failures:
        names = ", ".join(f"{name} (exit status {status})" for name, status in failures.items())
        say(f"{len(failures)} of {len(runs)} failed: {names}. Run the same command to try them again", err=True)
        raise click.exceptions.Exit(next(iter(failures.values())))


# A wrong setting, no space left, a request to stop, Ctrl-C: the next run would end in the same way.
_ENDS_ALL = (ConfigError.exit_status, StorageError.exit_status, UnfinishedError.exit_status, 130)


@dataclass(frozen=True)
class _OneRun:
    """A member of the grid with its settings."""

    values: str
    """`key=value` of the settings that differ"""
    config: Config
    overrides: tuple[str, ...]
    """All overrides of the file"""
    folder: Path


def _one_run(sweep: Sweep, member: Member, parent: Path) -> _OneRun:
    for key in (text.partition("=")[0] for text in member.overrides):
        if key == "train.output_dir":
            raise ConfigError("--over train.output_dir: a sweep names its runs' folders. Set their place by --into")
        if key.partition(".")[0] in ("precompute", "cluster"):
            raise ConfigError(f"--over {key}: the runs share stage one and the machine. Set it in the file or by -o")
    folder = parent / member.name
    together = (*sweep.overrides, *member.overrides, f"train.output_dir={json.dumps(str(folder))}")
    config = load_config(sweep.config_file, together)
    if config.reference.sync is not None:
        # The shards of the first window have the pairs of this run's first steps alone.
        shards = parent / f"{member.name}-shards"
        together = (*together, f"precompute.output={json.dumps(str(shards))}")
        config = load_config(sweep.config_file, together)
    if (named := config.train.given.get("run_name")) is not None:
        # Trackers show the runs by it, and Trackio takes runs of equal names for one.
        together = (*together, f"train.run_name={json.dumps(f'{named}-{member.name}')}")
        config = load_config(sweep.config_file, together)
    refuse_early(config)
    return _OneRun(", ".join(member.overrides), config, together, folder)


def _check_served(base: Config, runs: Sequence[_OneRun], processes: int) -> None:
    """Make sure that one set of shards serves all runs. Raises ConfigError."""
    shared = identity_of_run(base, load_tokenizer(base))
    for i, one in enumerate(runs):
        what = f"--over {one.values}"
        if one.config.reference.sync is not None and processes > 1:
            raise ConfigError(f"--processes {processes}: {what} moves the reference, and such a run is one process")
        found = differences(shared, identity_of_run(one.config, load_tokenizer(one.config)), joining=True)
        if found:
            raise ConfigError(
                f"{what}: must need the shards of the settings without --over, which all runs share. They differ in "
                f"{'; '.join(found)}"
            )
        if unscored := set(one.config.data.names) - set(base.data.names):
            raise ConfigError(f"{what}: the set {min(unscored)} is not scored for all runs. Name it in the file")
        if twin := next((other for other in runs[:i] if _told(other.config) == _told(one.config)), None):
            raise ConfigError(f"--over: {twin.values} and {one.values} are the same settings")


def _told(config: Config) -> object:
    """Return the settings in which two runs of a sweep may differ."""
    own = dataclasses.replace(config.train, output_dir=None, given={})
    options = {key: value for key, value in config.train.options.items() if key != "run_name"}
    return config.data, config.policy, config.reference, config.loss, own, options


_TEMPERATURE, _SEED = 1.0, 0
"""Temperature 1 estimates the KL without bias; a shared seed makes the runs' replies comparable"""


def _generate(one: _OneRun, sweep: Sweep, commands: Commands) -> int:
    """Generate a finished run's replies, unless those of its policy, set and sampling exist. Returns an exit status."""
    set_name, step = next(iter((*one.config.data.eval, *one.config.data.training))), read_record(one.folder)["step"]
    asked = (step, set_name, sweep.num_prompts, sweep.max_tokens, _TEMPERATURE, _SEED, sweep.reward_model)
    there = {
        (g.step, g.set_name, g.num_prompts, g.max_tokens, g.temperature, g.seed, g.reward_by)
        for g in read_run(one.folder).generations
    }
    if there == {asked}:
        return 0
    words = ["--set", set_name, "--prompts", str(sweep.num_prompts), "--max-tokens", str(sweep.max_tokens)]
    words += ["--temperature", str(_TEMPERATURE), "--seed", str(_SEED)]
    if sweep.reward_model is not None:
        words += ["--reward-model", sweep.reward_model]
    return commands.run("generate", str(one.folder), *words)


def _compare(runs: Sequence[Run], parent: Path, *, drawn: bool) -> None:
    """Print the table of all finished runs, and write their page."""
    if not runs:
        return
    rows = [_row(shown.name, shown.run) for shown in show_runs(runs)]
    emit("sweep", {"runs": rows})
    # Columns that no run fills are left out.
    header = [name for name in rows[0] if any(row[name] for row in rows)]
    table = aligned([header, *([row[name] for name in header] for row in rows)])
    say("\n".join(["", *table, ""]))
    if drawn:
        page = parent / _PAGE
        write_page(page, report_page(runs))
        say(f"{len(runs)} runs in {page}")


def _row(name: str, run: Run) -> dict[str, str]:
    """Give a run's figures on its first held-out set, or on its last training pairs if it has none."""
    pairs, prefix = next(iter(run.held_out().items()), ("train", ""))

    def last(metric: str) -> str:
        value = run.figure(prefix + metric)
        return "" if value is None else f"{value:.4g}"

    reward = estimate_reward(run.generations, "policy")
    return {
        "run": name,
        "steps": f"{run.step:,}" if run.policy_step in (None, run.step) else f"{run.policy_step:,} of {run.step:,}",
        "pairs of": pairs,
        "loss": last("loss"),
        "accuracy": last("rewards/accuracies"),
        "margin": last("rewards/margins"),
        "KL, nats": str(estimate_kl(run.generations)) if run.generations else "",
        "reward": "" if reward is None else str(reward),
    }
