"""Runs beside each other: what sets their settings apart, and the name and color that each has on a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Any

from pipeline.report.charts import style_of
from pipeline.run.reading import Run

__all__ = [
    "Shown",
    "common_folder",
    "differing_settings",
    "flatten",
    "show_runs",
]


@dataclass(frozen=True)
class Shown:
    """A run as a page shows it."""

    run: Run
    name: str
    color: str
    dash: str


def show_runs(runs: Sequence[Run]) -> list[Shown]:
    """Give each run its name and the style of its curves."""
    return [Shown(run, name, *style_of(i)) for i, (run, name) in enumerate(zip(runs, _names(runs), strict=True))]


# Where a run is written, shown and started says nothing about what it learns.
_NOT_COMPARED = ("cluster.", "train.output_dir", "train.logging_dir", "train.run_name", "train.hub_", "train.report_to")


_FIRST = ("loss.", "train.learning_rate", "policy.", "reference.")


_MOST_IN_NAME = 3


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """List the settings that are not the same in all runs: by key, the value in each run, as text.

    Settings of the loss come first. A run whose settings can't be read is left out of the comparison, and shows "?".
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


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat.update(flatten(item, f"{prefix}{key}."))
        elif item is not None:
            flat[f"{prefix}{key}"] = item
    return flat


def _value_text(value: Any) -> str:
    """Text of a setting; numbers that YAML left as words (`3e-4`) read as numbers do."""
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
    """Name each run by what sets it apart: settings that differ, the folder where they don't tell."""
    common = common_folder(runs)
    folders = [str(run.folder.absolute().relative_to(common)) for run in runs]
    folders = [run.folder.name if name == "." else name for run, name in zip(runs, folders, strict=True)]
    differing = [(key, values) for key, values in differing_settings(runs).items() if _rank(key) < len(_FIRST)]
    differing = differing or list(differing_settings(runs).items())
    if len(runs) == 1 or not differing or len(differing) > _MOST_IN_NAME:
        return folders
    names = [", ".join(f"{key.split('.')[-1]}={values[i]}" for key, values in differing) for i in range(len(runs))]
    return [
        f"{name} ({folder})" if names.count(name) > 1 or not run.settings else name
        for name, folder, run in zip(names, folders, runs, strict=True)
    ]


def common_folder(runs: Sequence[Run]) -> Path:
    return Path(commonpath([run.folder.absolute() for run in runs]))
