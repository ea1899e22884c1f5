"""Several runs on one page: their names, their colors, the settings in which they differ, and tables over runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup

from pipeline.base.errors import printable
from pipeline.base.nested import flatten
from pipeline.report.charts import style_of
from pipeline.report.pages import swatch, table
from pipeline.run.reading import Run

__all__ = ["Shown", "by_equal", "common_folder", "differing_settings", "runs_table", "show_runs"]

_Described = TypeVar("_Described")

# Places and names of a run don't affect what it learns.
_NOT_COMPARED = ("cluster.", "train.output_dir", "train.logging_dir", "train.run_name", "train.hub_", "train.report_to")
_FIRST = ("loss.", "train.learning_rate", "policy.", "reference.")
_MOST_IN_NAME = 3


@dataclass(frozen=True)
class Shown:
    """A run with its name and the style of its curves on a page."""

    run: Run
    name: str
    color: str
    dash: str
    alone: bool
    """The page shows this run only"""

    @property
    def label(self) -> Markup:
        return Markup('<span class="run">{}</span>').format(swatch(self.color, self.name))


def show_runs(runs: Sequence[Run]) -> list[Shown]:
    """Give each run its name and style."""
    names = _names(runs)
    return [
        Shown(run, name, *style_of(i), alone=len(runs) == 1)
        for i, (run, name) in enumerate(zip(runs, names, strict=True))
    ]


def runs_table(header: Sequence[str], rows: Sequence[tuple[Shown, Sequence[object]]]) -> Markup:
    """Make a table with one row or more for each run, and a column of their names unless the page shows one run."""
    if all(one.alone for one, _ in rows):
        return table(header, [cells for _, cells in rows])
    return table(["run", *header], [[one.label, *cells] for one, cells in rows])


def by_equal(
    shown: Sequence[Shown], describe: Callable[[Run], _Described], draw: Callable[[_Described], Markup]
) -> Markup:
    """Draw each description once, under the names of the runs that share it. Empty descriptions are left out."""
    groups: list[tuple[list[str], _Described]] = []
    for one in shown:
        described = describe(one.run)
        names = next((names for names, other in groups if other == described), None)
        if names is not None:
            names.append(one.name)
        elif described:
            groups.append(([one.name], described))
    shared_by_all = len(groups) == 1 and len(groups[0][0]) == len(shown)
    parts = []
    for names, described in groups:
        title = Markup("") if shared_by_all else Markup("<h3>{}</h3>").format(printable("; ".join(names)))
        parts.append(title + draw(described))
    return Markup("").join(parts)


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Give the settings that differ: key -> the value in each run, as text. Settings of the loss come first.

    A run whose settings can't be read is not compared; its values are "?".
    """
    flat = [flatten(run.settings) for run in runs]
    known = [settings for settings in flat if settings]
    keys = sorted({key for settings in known for key in settings}, key=lambda key: (_rank(key), key))
    return {
        key: [_value_text(settings.get(key)) if settings else "?" for settings in flat]
        for key in keys
        if not key.startswith(_NOT_COMPARED) and len({_value_text(settings.get(key)) for settings in known}) > 1
    }


def _rank(key: str) -> int:
    return next((i for i, start in enumerate(_FIRST) if key.startswith(start)), len(_FIRST))


def _value_text(value: Any) -> str:
    """Format a setting. Numbers that YAML reads as text, like `3e-4`, look as other numbers do."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | str):
        try:
            return f"{float(value):g}"
        except ValueError:
            return str(value)
    return ", ".join(map(_value_text, value)) if isinstance(value, list) else str(value)


def _names(runs: Sequence[Run]) -> list[str]:
    """Name each run by up to three differing settings, else by its folder."""
    common = common_folder(runs)
    folders = [str(run.folder.absolute().relative_to(common)) for run in runs]
    folders = [run.folder.name if name == "." else name for run, name in zip(runs, folders, strict=True)]
    every = differing_settings(runs)
    differing = {key: values for key, values in every.items() if _rank(key) < len(_FIRST)} or every
    if len(runs) == 1 or not differing or len(differing) > _MOST_IN_NAME:
        return folders
    names = [
        ", ".join(f"{key.split('.')[-1]}={values[i]}" for key, values in differing.items()) for i in range(len(runs))
    ]
    return [
        f"{name} ({folder})" if names.count(name) > 1 or not run.settings else name
        for name, folder, run in zip(names, folders, runs, strict=True)
    ]


def common_folder(runs: Sequence[Run]) -> Path:
    """Give the innermost folder that holds all runs; of one run, its own."""
    return Path(commonpath([run.folder.absolute() for run in runs]))
