"""The share of each training set in an epoch: chosen by key, nested, independent of the rows' order."""

import hashlib
from pathlib import Path

import datasets
import numpy as np
import pytest

from pipeline.config.data import TrainSetConfig
from pipeline.training.mixture import copies_of, mix

KEYS = [hashlib.md5(str(i).encode()).digest() for i in range(4000)]


def a_set(start: int, count: int, *, with_tokens: bool = True) -> datasets.Dataset:
    columns = {"pair_key": KEYS[start : start + count], "row": list(range(count))}
    features = datasets.Features({"pair_key": datasets.Value("binary"), "row": datasets.Value("int64")})
    if with_tokens:
        columns["token_start"], features["token_start"] = list(range(count)), datasets.Value("int64")
    return datasets.Dataset.from_dict(columns, features=features)


def settings(**fractions: float) -> dict[str, TrainSetConfig]:
    return {name: TrainSetConfig(path="x", fraction=fraction) for name, fraction in fractions.items()}


@pytest.mark.parametrize(("fraction", "counts"), [(0.25, {0, 1}), (1.0, {1}), (1.5, {1, 2}), (2.0, {2})])
def test_an_epoch_has_each_pair_as_often_as_the_fraction_says(fraction: float, counts: set[int]) -> None:
    copies = copies_of(KEYS, fraction, 42)
    assert set(copies.tolist()) == counts
    # Three standard errors of 4,000 draws are 0.024.
    assert copies.mean() == pytest.approx(fraction, abs=0.024)


def test_a_larger_fraction_has_all_pairs_of_a_smaller_one() -> None:
    smaller = copies_of(KEYS, 0.01, 3)
    for fraction in (0.1, 0.9, 1.0, 1.2, 2.7):
        larger = copies_of(KEYS, fraction, 3)
        assert (larger >= smaller).all() and larger.sum() > smaller.sum()
        smaller = larger


def test_key_and_seed_alone_choose_a_pair() -> None:
    assert (copies_of(KEYS[::-1], 0.5, 0)[::-1] == copies_of(KEYS, 0.5, 0)).all()
    assert (copies_of(KEYS, 0.5, 1) != copies_of(KEYS, 0.5, 0)).mean() == pytest.approx(0.5, abs=0.03)


def test_sets_are_concatenated_with_their_numbers() -> None:
    mixed = mix({"a": a_set(0, 3), "b": a_set(3, 2)}, settings(a=1.0, b=2.0), seed=0)
    assert mixed.counts == {"a": 3, "b": 4}
    assert mixed.pairs["set"] == [0, 0, 0, 1, 1, 1, 1]
    assert mixed.pairs["row"] == [0, 1, 2, 0, 0, 1, 1]
    assert mixed.pairs["pair_key"] == [*KEYS[:3], KEYS[3], KEYS[3], KEYS[4], KEYS[4]]


def test_the_order_in_which_a_file_names_its_sets_does_not_matter() -> None:
    sets, fractions = {"b": a_set(3, 200), "a": a_set(0, 3)}, settings(a=2.0, b=0.5)
    one, two = mix(sets, fractions, seed=0), mix(dict(sorted(sets.items())), fractions, seed=0)
    assert one.pairs.to_dict() == two.pairs.to_dict() and one.counts == two.counts


def test_a_set_of_sums_takes_the_place_of_token_log_probs_from_all() -> None:
    mixed = mix({"a": a_set(0, 3), "b": a_set(3, 2, with_tokens=False)}, settings(a=1.0, b=1.0), seed=0)
    assert "token_start" not in mixed.pairs.column_names


def test_a_single_set_stays_as_it_is(tmp_path: Path) -> None:
    pairs = a_set(0, 3)
    assert mix({"train": pairs}, {}, seed=0).pairs is pairs
    assert np.all(copies_of([], 1.0, 0) == [])
