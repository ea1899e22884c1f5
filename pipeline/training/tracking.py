"""Attach refshard's settings, and what stage one took, to a run in the library's trackers."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import transformers

from pipeline.base.nested import flatten
from pipeline.config.reader import as_dict
from pipeline.config.schema import Config
from pipeline.run.inputs import RunInputs

__all__ = ["TrackedArguments", "attach"]

_LEFT_OUT = ("train", "cluster")
"""Sections that are not attached: the library attaches its own fields of `train`, and jobs are not part of a run"""


class TrackedArguments(transformers.TrainingArguments):
    """The library's arguments, with further settings in `to_dict`, from which its trackers take a run's settings."""

    attached: Mapping[str, Any] = {}
    """Values by name, such as `loss/beta`; not a field, so no setting of `train`"""

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **self.attached}  # type: ignore[no-untyped-call]


def attach(arguments: transformers.TrainingArguments, config: Config, inputs: RunInputs) -> None:
    """Let trackers show refshard's own settings (`loss/beta`), and stage one (`stage_one/tokens`), on the run's page.

    Call it before training begins. A name has the characters that all trackers take.
    """
    assert isinstance(arguments, TrackedArguments)
    settings = {name: value for name, value in as_dict(config).items() if name not in _LEFT_OUT}
    own = [field.name for field in dataclasses.fields(config.train) if field.name not in ("output_dir", "given")]
    settings["train"] = {name: getattr(config.train, name) for name in own}
    costs, reference = inputs.stage_one, inputs.reference
    summed = {key: math.fsum(cost.get(key) or 0 for cost in costs) for key in ("pairs", "tokens", "seconds")}
    settings["stage_one"] = {
        **({} if reference is None else {"reference": reference.name, "fingerprint": reference.fingerprint}),
        **(summed if costs else {}),
        **({"device": ", ".join(sorted({str(cost.get("device")) for cost in costs}))} if costs else {}),
    }
    # MLflow's characters; the others take these too.
    flat = flatten(settings, "/")
    arguments.attached = {re.sub(r"[^0-9A-Za-z_\-. :/]", "_", name): value for name, value in flat.items()}
