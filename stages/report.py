"""Write the page of one run, or of several side by side."""

from collections.abc import Sequence
from os.path import commonpath
from pathlib import Path

import click

from pipeline.report.pages import check_charts, has_charts, write_page
from pipeline.report.run_page import report_page
from pipeline.run.reading import read_run

__all__ = [
    "run",
]


def run(folders: Sequence[Path], *, output: Path | None = None) -> None:
    """Read the runs, finished or not, and write their page.

    Args:
        folders: Of the runs; one that is named twice is shown once.
        output: Of the page; `report.html` in the run's folder, or in the one that several have in common, if left out.

    Raises:
        ConfigError: A folder is no run's, or Plotly is not installed.
        StorageError: The page can't be written.
    """
    check_charts()
    runs = [read_run(folder) for folder in dict.fromkeys(folder.resolve() for folder in folders)]
    file = output or Path(commonpath([one.folder for one in runs])) / "report.html"
    text = report_page(runs)
    write_page(file, text)
    named = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    remarks = sum(len(one.remarks) for one in runs)
    size = f"{len(text.encode()) / 1e6:.1f} MB, most of it the charts' library; " if has_charts(text) else ""
    click.echo(
        f"{named} in {file} ({size}it opens without a network)"
        f"{f'; {remarks} remarks, under Summary' if remarks else ''}"
    )
