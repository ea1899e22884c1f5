"""A saved run is a longer one's beginning only if its length alone differs and no step depends on it."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.base.errors import IdentityError
from pipeline.run.identity import check_same_run, is_longer

CONSTANT = {"lr_scheduler_type": "constant"}


def identity(sync: Any = None, **train: Any) -> dict[str, Any]:
    return {"train": train, "sync": sync, "loss": {"beta": 0.1}}


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "inverse_sqrt"])
@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"max_steps": 2}, {"max_steps": 4}),
        ({"num_train_epochs": 1.0}, {}),
        ({"num_train_epochs": 1.0}, {"num_train_epochs": 1.5}),
    ],
)
def test_more_steps_or_epochs_are_a_longer_run(schedule: str, before: Any, now: Any) -> None:
    settings = {"lr_scheduler_type": schedule, "warmup_steps": 3, "learning_rate": 1e-5}
    saved, run = identity(**settings, **before), identity(**settings, **now)
    assert is_longer(saved, run) and not is_longer(run, saved) and not is_longer(run, run)
    check_same_run(Path("run"), saved, run)
    with pytest.raises(IdentityError) as refused:
        check_same_run(Path("run"), run, saved)
    assert "made longer" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "sync", "why"),
    [
        ({}, None, "train.lr_scheduler_type linear the learning rates of all steps depend on their number"),
        ({"lr_scheduler_type": "cosine"}, None, "train.lr_scheduler_type cosine"),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, None, "warmup is a share"),
        (CONSTANT, {"steps": 2}, "reference.sync"),
        ({**CONSTANT, "deepspeed": "zero.json"}, None, "DeepSpeed"),
    ],
)
def test_a_run_whose_steps_depend_on_their_number_is_refused_with_the_reason(
    settings: Any, sync: Any, why: str
) -> None:
    saved, run = identity(sync, **settings, max_steps=2), identity(sync, **settings, max_steps=4)
    assert not is_longer(saved, run)
    with pytest.raises(
        IdentityError, match=rf"It can't be made longer: .*{why}.* To start over, set train\.output_dir to a new"
    ):
        check_same_run(Path("run"), saved, run)


@pytest.mark.parametrize(
    ("saved", "run"),
    [
        (identity(**CONSTANT, max_steps=2), identity(**CONSTANT, num_train_epochs=9.0)),
        (identity(**CONSTANT, max_steps=2), identity(**CONSTANT, max_steps=4, seed=1)),
        (identity(**CONSTANT, max_steps=2), {**identity(**CONSTANT, max_steps=4), "loss": {"beta": 0.2}}),
    ],
)
def test_a_run_that_differs_in_more_than_its_length_is_another_one(saved: Any, run: Any) -> None:
    assert not is_longer(saved, run)
    with pytest.raises(IdentityError) as refused:
        check_same_run(Path("run"), saved, run)
    assert "made longer" not in str(refused.value)
