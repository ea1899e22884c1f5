"""Begin an attempt of a run: clear what earlier attempts made for themselves, and find the checkpoint to resume."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.base.files import delete_named, replace_file
from pipeline.base.progress import say
from pipeline.config.reader import settings_text
from pipeline.config.schema import Config
from pipeline.replies.records import GENERATIONS
from pipeline.run.attempts import ATTEMPT_NAME, Attempt
from pipeline.run.checkpoints import delete_run, find_checkpoint, is_recorded
from pipeline.run.reading import RECORD, SETTINGS
from pipeline.training.ending import STAGING

__all__ = ["JOINED", "begin_attempt"]

JOINED = "joined"
"""Folder of the joined sets in a run's folder"""


def begin_attempt(config: Config, attempt: Attempt, identity: Mapping[str, Any], *, overwrite: bool) -> Path | None:
    """Clear the output folder of what earlier attempts made for themselves, and find the checkpoint to resume."""
    output = attempt.run_folder
    if overwrite:
        delete_run(output)
    elif is_recorded(output):
        # The run is made longer: its end is another one.
        (output / RECORD).unlink()
        (output / GENERATIONS).unlink(missing_ok=True)
    delete_named(output / JOINED, ATTEMPT_NAME)
    delete_named(output, re.compile(re.escape(STAGING) + ATTEMPT_NAME.pattern))
    checkpoint = find_checkpoint(output, identity, lambda text: say(f"warning: {text}", err=True))
    # Save the settings, defaults filled in, before anything runs. Access tokens are left out.
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / SETTINGS, settings_text(config).encode())
    return checkpoint
