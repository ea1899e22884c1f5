"""Stage one, killed at random instants with changing numbers of workers, here and on an S3 server."""

from pathlib import Path

import pytest

from faults.kill_scoring import kill_until, place
from support.tally import tally

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("s3", "kills"),
    [
        pytest.param(False, 10, id="folder"),
        pytest.param(True, 4, id="s3"),
        pytest.param(False, 100, id="folder, long", marks=pytest.mark.nightly),
        pytest.param(True, 50, id="s3, long", marks=pytest.mark.nightly),
    ],
)
def test_whatever_is_killed_the_same_rows_are_there_at_the_end(tmp_path: Path, s3: bool, kills: int) -> None:
    with place(s3, tmp_path) as outputs:
        summary = kill_until(kills, tmp_path, outputs, seed=kills)
    print(summary)
    assert summary.kills >= kills
    assert summary.outputs >= 1
    assert (summary.wrong, summary.lost) == (0, 0), summary
    fault = f"SIGKILL of stage one, 1 to 3 workers, {'s3://' if s3 else 'a folder'} ({summary.in_a_write} in a write)"
    tally(fault, summary.kills, outcome=f"{summary.outputs} outputs, byte for byte those of an undisturbed run")
