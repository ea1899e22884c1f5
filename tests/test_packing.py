"""Batches: every pair once, under the budget, longest first; masks say which tokens are real and which scored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.packing import make_batch, plan_batches
from pipeline.tokens import TokenizedPair

_ids = st.lists(st.integers(0, 99), min_size=1, max_size=20)
_pairs = st.lists(
    st.builds(TokenizedPair, prompt_ids=_ids, chosen_ids=_ids, rejected_ids=_ids), min_size=1, max_size=30
)
_budgets = st.integers(1, 400)


def width(pair: TokenizedPair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


@given(pairs=_pairs, budget=_budgets)
@settings(max_examples=60, deadline=None)
def test_every_pair_is_in_exactly_one_batch(pairs: list[TokenizedPair], budget: int) -> None:
    batches = plan_batches(pairs, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(pairs)))
    assert all(batches)


@given(pairs=_pairs, budget=_budgets)
@settings(max_examples=60, deadline=None)
def test_a_batch_with_its_padding_keeps_to_the_budget_or_is_one_pair(pairs: list[TokenizedPair], budget: int) -> None:
    for plan in plan_batches(pairs, budget):
        tokens = make_batch([pairs[i] for i in plan], pad_id=0).input_ids.numel()
        assert tokens <= budget or len(plan) == 1


@given(pairs=_pairs, budget=_budgets)
@settings(max_examples=60, deadline=None)
def test_longest_pairs_come_first_and_equal_ones_in_their_order(pairs: list[TokenizedPair], budget: int) -> None:
    order = [i for batch in plan_batches(pairs, budget) for i in batch]
    assert order == sorted(order, key=lambda i: (-width(pairs[i]), i))


@given(pairs=_pairs, budget=_budgets)
@settings(max_examples=30, deadline=None)
def test_no_batch_could_have_taken_the_next_pair(pairs: list[TokenizedPair], budget: int) -> None:
    batches = plan_batches(pairs, budget)
    for batch in batches[:-1]:
        assert 2 * (len(batch) + 1) * width(pairs[batch[0]]) > budget


@given(pairs=_pairs, budget=_budgets)
@settings(max_examples=30, deadline=None)
def test_the_plan_depends_on_lengths_alone(pairs: list[TokenizedPair], budget: int) -> None:
    others = [
        TokenizedPair(
            prompt_ids=[7] * len(p.prompt_ids),
            chosen_ids=[8] * len(p.chosen_ids),
            rejected_ids=[9] * len(p.rejected_ids),
        )
        for p in pairs
    ]
    assert plan_batches(pairs, budget) == plan_batches(pairs, budget) == plan_batches(others, budget)


def test_no_pairs_make_no_batches() -> None:
    assert plan_batches([], 100) == []


def test_rows_are_chosen_then_rejected_padded_on_the_right() -> None:
    pairs = [
        TokenizedPair(prompt_ids=[1, 2], chosen_ids=[3], rejected_ids=[4, 5, 6]),
        TokenizedPair(prompt_ids=[7], chosen_ids=[8, 9], rejected_ids=[10]),
    ]
    batch = make_batch(pairs, pad_id=99)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 99, 99],
        [7, 8, 9, 99, 99],
        [1, 2, 4, 5, 6],
        [7, 10, 99, 99, 99],
    ]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.completion_mask.int().tolist() == [
        [0, 0, 1, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1],
        [0, 1, 0, 0, 0],
    ]
    assert batch.num_pairs == 2


@given(pairs=_pairs, pad_id=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_masks_give_back_the_ids_though_padding_is_a_real_token(pairs: list[TokenizedPair], pad_id: int) -> None:
    batch = make_batch(pairs, pad_id)
    rows = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    assert batch.num_pairs == len(pairs)
    assert batch.input_ids.shape == (2 * len(pairs), max(map(width, pairs)))
    for i, (prompt, completion) in enumerate(rows):
        assert batch.input_ids[i][batch.attention_mask[i].bool()].tolist() == prompt + completion
        assert batch.input_ids[i][batch.completion_mask[i]].tolist() == completion
        assert set(batch.input_ids[i][batch.attention_mask[i] == 0].tolist()) <= {pad_id}


def test_dtypes_are_those_that_models_take() -> None:
    batch = make_batch([TokenizedPair(prompt_ids=[1], chosen_ids=[2], rejected_ids=[3])], pad_id=0)
    assert (batch.input_ids.dtype, batch.attention_mask.dtype) == (torch.int64, torch.int64)
    assert batch.completion_mask.dtype == torch.bool
    moved = batch.to(torch.device("meta"))
    assert {t.device.type for t in vars(moved).values()} == {"meta"}


@pytest.mark.parametrize(("budget", "sizes"), [(16, [4]), (15, [3, 1]), (8, [2, 2]), (7, [1] * 4), (1, [1] * 4)])
def test_the_budget_is_met_exactly(budget: int, sizes: list[int]) -> None:
    pairs = [TokenizedPair(prompt_ids=[1], chosen_ids=[2], rejected_ids=[3])] * 4
    assert [len(batch) for batch in plan_batches(pairs, budget)] == sizes
