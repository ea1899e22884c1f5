"""What a test tried, written down for the page of results: one line of JSON in the file that an environment variable
names, none without it."""

import json
import os
from pathlib import Path

VARIABLE = "REFSHARD_TALLY"


def tally(fault: str, tried: int, *, lost: int = 0, wrong: int = 0, outcome: str = "") -> None:
    """Call it at the end of a test, when all that it asserts has held.

    Args:
        fault: What was done to the run, in a few words.
        tried: How many times, or in how many variants.
        lost: Rows, steps or files that were not there at the end.
        wrong: Values that were read and are not what they should be.
        outcome: What came of it.
    """
    if os.environ.get(VARIABLE):
        with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
            # Like `tests/test_x.py::test_name[case] (call)`.
            test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("[")[0].partition(" ")[0]
            line = {"fault": fault, "tried": tried, "lost": lost, "wrong": wrong, "outcome": outcome, "test": test}
            file.write(json.dumps(line) + "\n")
