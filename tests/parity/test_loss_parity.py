"""Every loss and option trains as TRL's DPOTrainer does, to rounding: docs/losses.md's table, held to its bar (L3)."""

import dataclasses
from typing import Any

import pytest

from support.parity_table import CASES, IN_TRL, LARGEST_BAR, MOVED_BAR, PAGE, Bench, Case, measure, names_in

pytestmark = pytest.mark.slow

COMPARED = [case for case in CASES if not case.why]
IGNORED_SMOOTHING = [case for case in CASES if case.why and not case.peer_fails]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.name)
def test_training_equals_trl_in_loss_gradient_norm_and_metrics(bench: Bench, case: Case) -> None:
    gaps = measure(bench, case)
    print(gaps)
    assert gaps.moved > MOVED_BAR, "training did not move the loss, so that equal losses say little"
    assert gaps.within(LARGEST_BAR, case.mean_bar), gaps


def _named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("`sigmoid`", {"beta": 0.1001}),
        ("`ipo`", {"beta": 0.1001}),
        ("`sft`", {"beta": 0.1001}),  # seen in the rewards alone
        ("`sigmoid`, beta 0.5", {"beta": 0.5005}),
        ("`robust`, label_smoothing 0.1", {"label_smoothing": 0.1001}),
        ("`exo_pair`, label_smoothing 0.001", {"label_smoothing": 0.001001}),
        ("`sigmoid` + `hinge` + `ipo`, weights [1.0, 0.5, 0.25]", {"weights": [1.0, 0.5, 0.25025]}),
        ("`sigmoid`, f_divergence_type alpha_divergence", {"f_alpha_divergence_coef": 0.5005}),
        ("`sigmoid`, ld_alpha 0.5", {"ld_alpha": 0.5005}),
        ("`discopop`, discopop_tau 0.5", {"discopop_tau": 0.5005}),
        ("`sigmoid`, Mixtral, router_aux_loss_coef 0.1", {"router_aux_loss_coef": 0.1001}),
    ],
)
def test_an_option_that_is_wrong_by_a_thousandth_shows(bench: Bench, name: str, wrong: dict[str, Any]) -> None:
    case = _named(name)
    gaps = measure(bench, case, ours=dataclasses.replace(case, loss={**case.loss, **wrong}))
    print(gaps)
    assert not gaps.within(LARGEST_BAR, case.mean_bar)


@pytest.mark.parametrize("case", IGNORED_SMOOTHING, ids=lambda case: case.name)
def test_trl_with_smoothing_that_it_ignores_is_ours_without(bench: Bench, case: Case) -> None:
    assert measure(bench, case).loss[0] > 1e-3
    plain = {key: value for key, value in case.loss.items() if key != "label_smoothing"}
    assert measure(bench, case, ours=dataclasses.replace(case, loss=plain)).within(LARGEST_BAR, case.mean_bar)


def test_where_trl_stops_with_an_error_ours_trains(bench: Bench) -> None:
    [case] = [case for case in CASES if case.peer_fails]
    sgd = {"optim": "sgd", "learning_rate": case.learning_rate}
    with pytest.raises(RuntimeError, match="inplace operation"):
        bench.train_trl(case, sgd)
    losses = [entry["loss"] for entry in bench.train_ours(case, sgd)]
    assert sum(losses[5:]) < sum(losses[:5])


def test_the_cases_name_every_loss_once_and_no_case_twice() -> None:
    alone = [case.loss["type"] for case in CASES[:15]]
    assert alone == IN_TRL
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_page_lists_exactly_the_scripts_cases() -> None:
    assert names_in(PAGE.read_text(encoding="utf-8")) == [case.name for case in CASES]
