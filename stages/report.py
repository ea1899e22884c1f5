"""Write the page of one run, or of several runs beside each other."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.base.progress import say
from pipeline.report.comparison import common_folder
from pipeline.report.pages import check_charts, write_page
from pipeline.report.run_page import report_page
from pipeline.run.reading import read_run

__all__ = ["run"]


def run(folders: Sequence[Path], *, output: Path | None = None) -> None:
    """Read runs, finished or not, each once, and write their page.

    Raises:
        ConfigError: A folder is not a run's, or Plotly is not installed.
        StorageError: The page can't be written.
    """
    check_charts()
    runs = [read_run(folder) for folder in dict.fromkeys(folder.resolve() for folder in folders)]
    file = output or common_folder(runs) / "report.html"
    text = report_page(runs)
    write_page(file, text)
    named = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    num_remarks = sum(len(one.remarks) for one in runs)
    remarks = f"; {num_remarks} remarks, under Summary" if num_remarks else ""
    say(f"{named} in {file} ({len(text.encode()) / 1e6:.1f} MB; it opens without a network){remarks}")
