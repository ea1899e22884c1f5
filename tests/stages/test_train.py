"""Stage two at its end."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.training import TrainSection
from stages import train


class Saved(Exception):
    """Raised in place of the saving that would follow."""


@pytest.mark.parametrize(("given", "evaluates"), [({}, True), ({"eval_strategy": "no"}, False)])
def test_held_out_sets_are_evaluated_at_the_end_unless_the_settings_say_no(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], evaluates: bool
) -> None:
    evaluated: list[int] = []

    def save(*_: object) -> None:
        raise Saved

    monkeypatch.setattr(train, "metrics_of", lambda trainer, step: evaluated.append(step))
    monkeypatch.setattr(train, "save_policy", save)
    run: Any = SimpleNamespace(
        output=None,
        attempt=None,
        arguments=SimpleNamespace(load_best_model_at_end=False),
        config=SimpleNamespace(train=TrainSection(output_dir="policy", given=given)),
    )
    trainer: Any = SimpleNamespace(state=SimpleNamespace(global_step=7, best_model_checkpoint=None))
    with pytest.raises(Saved):
        train._finish(run, trainer, inputs=None, pairs=1, hub=None)
    assert evaluated == ([7] if evaluates else [])
