"""Batches: every pair once, under the budget, longest first; a packed row holds each prompt once and loses nothing."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.tokens import TokenizedPair
from pipeline.scoring.packing import Batch, Reading, cache_pairs, make_batch, pack_pairs, pad_pairs, plan_batches

_ids = st.lists(st.integers(0, 99), min_size=1, max_size=20)
_pairs = st.lists(
    st.builds(TokenizedPair, prompt_ids=_ids, chosen_ids=_ids, rejected_ids=_ids), min_size=1, max_size=30
)
_budgets = st.integers(1, 400)
# Few ids and short ones: prompts and completions are often shared, and completions often of one token.
_few = st.lists(st.integers(0, 1), min_size=1, max_size=3)
_sharing_pairs = st.lists(
    st.builds(TokenizedPair, prompt_ids=_few, chosen_ids=_few, rejected_ids=_few), min_size=1, max_size=20
)
_any_pairs = st.one_of(_pairs, _sharing_pairs)
_readings = st.sampled_from(["packed", "cached", "padded"])


def width(pair: TokenizedPair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


@given(pairs=_any_pairs, budget=_budgets, reading=_readings)
@settings(max_examples=100, deadline=None)
def test_every_pair_is_in_exactly_one_batch(pairs: list[TokenizedPair], budget: int, reading: Reading) -> None:
    batches = plan_batches(pairs, budget, reading)
    assert sorted(i for batch in batches for i in batch) == list(range(len(pairs)))
    assert all(batches)


@given(pairs=_any_pairs, budget=_budgets, reading=_readings)
@settings(max_examples=100, deadline=None)
def test_a_batch_with_its_padding_keeps_to_the_budget_or_is_one_pair(
    pairs: list[TokenizedPair], budget: int, reading: Reading
) -> None:
    for plan in plan_batches(pairs, budget, reading):
        together = [pairs[i] for i in plan]
        batch = make_batch(together, 0, reading)
        computed = [batch.input_ids, *(part.ids for part in batch.continuations or ())]
        assert sum(ids.numel() for ids in computed) <= budget or len(plan) == 1


@given(pairs=_pairs, budget=_budgets)
@settings(max_examples=60, deadline=None)
def test_longest_pairs_come_first_and_equal_ones_in_their_order(pairs: list[TokenizedPair], budget: int) -> None:
    order = [i for batch in plan_batches(pairs, budget, "padded") for i in batch]
    assert order == sorted(order, key=lambda i: (-width(pairs[i]), i))


@given(pairs=_pairs, budget=_budgets)
@settings(max_examples=30, deadline=None)
def test_no_padded_batch_could_have_taken_the_next_pair(pairs: list[TokenizedPair], budget: int) -> None:
    batches = plan_batches(pairs, budget, "padded")
    for batch in batches[:-1]:
        assert 2 * (len(batch) + 1) * width(pairs[batch[0]]) > budget


@given(pairs=_any_pairs, budget=_budgets)
@settings(max_examples=100, deadline=None)
def test_no_packed_batch_could_have_taken_the_next_pair(pairs: list[TokenizedPair], budget: int) -> None:
    batches = plan_batches(pairs, budget, "packed")
    for batch, following in itertools.pairwise(batches):
        with_next = pack_pairs([pairs[i] for i in [*batch, following[0]]])
        assert with_next.input_ids.numel() > budget


@given(pairs=_sharing_pairs, budget=_budgets)
@settings(max_examples=60, deadline=None)
def test_pairs_that_share_a_prompt_stand_together_in_the_order_of_their_longest(
    pairs: list[TokenizedPair], budget: int
) -> None:
    order = [i for batch in plan_batches(pairs, budget, "packed") for i in batch]
    prompts = [tuple(pairs[i].prompt_ids) for i in order]
    starts = [k for k in range(len(prompts)) if k == 0 or prompts[k] != prompts[k - 1]]
    assert len(starts) == len(set(prompts))
    longest = [max(width(p) for p in pairs if tuple(p.prompt_ids) == prompts[k]) for k in starts]
    assert longest == sorted(longest, reverse=True)


@given(pairs=_pairs, budget=_budgets)
@settings(max_examples=30, deadline=None)
def test_a_padded_plan_depends_on_lengths_alone(pairs: list[TokenizedPair], budget: int) -> None:
    others = [
        TokenizedPair(
            prompt_ids=[7] * len(p.prompt_ids),
            chosen_ids=[8] * len(p.chosen_ids),
            rejected_ids=[9] * len(p.rejected_ids),
        )
        for p in pairs
    ]
    once, again, of_others = (plan_batches(some, budget, "padded") for some in (pairs, pairs, others))
    assert once == again == of_others


def test_no_pairs_make_no_batches() -> None:
    assert plan_batches([], 100, "packed") == plan_batches([], 100, "cached") == plan_batches([], 100, "padded") == []


@given(pairs=_any_pairs, budget=_budgets)
@settings(max_examples=60, deadline=None)
def test_a_cached_batch_holds_prompts_of_similar_lengths_and_the_largest_come_first(
    pairs: list[TokenizedPair], budget: int
) -> None:
    plans = plan_batches(pairs, budget, "cached")
    prompts = [sorted(len(pairs[i].prompt_ids) for i in plan) for plan in plans]
    for one, other in itertools.combinations(prompts, 2):
        assert one[-1] <= other[0] or other[-1] <= one[0]
    sizes = [
        2 * len(plan) * (max(lengths) + max(width(pairs[i]) - len(pairs[i].prompt_ids) for i in plan))
        for plan, lengths in zip(plans, prompts, strict=True)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size <= budget or len(plan) == 1 for size, plan in zip(sizes, plans, strict=True))


def test_rows_are_chosen_then_rejected_padded_on_the_right() -> None:
    pairs = [
        TokenizedPair(prompt_ids=[1, 2], chosen_ids=[3], rejected_ids=[4, 5, 6]),
        TokenizedPair(prompt_ids=[7], chosen_ids=[8, 9], rejected_ids=[10]),
    ]
    batch = pad_pairs(pairs, pad_id=99)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 99, 99],
        [7, 8, 9, 99, 99],
        [1, 2, 4, 5, 6],
        [7, 10, 99, 99, 99],
    ]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.logit_positions.tolist() == [1, 5, 6, 11, 12, 13, 15]
    assert batch.targets.tolist() == [3, 8, 9, 4, 5, 6, 10]
    assert batch.lengths.tolist() == [1, 2, 3, 1]
    assert batch.num_tokens.tolist() == [8, 5]
    assert batch.num_pairs == 2
    assert batch.expand_index is None and batch.layout is None and batch.position_ids is None


@given(pairs=_pairs, pad_id=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_masks_give_back_the_ids_though_padding_is_a_real_token(pairs: list[TokenizedPair], pad_id: int) -> None:
    batch = pad_pairs(pairs, pad_id)
    rows = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    assert batch.num_pairs == len(pairs)
    assert batch.input_ids.shape == (2 * len(pairs), max(map(width, pairs)))
    for i, (prompt, completion) in enumerate(rows):
        assert batch.input_ids[i][batch.attention_mask[i].bool()].tolist() == prompt + completion
        assert set(batch.input_ids[i][batch.attention_mask[i] == 0].tolist()) <= {pad_id}


def test_a_packed_row_holds_each_prompt_once_and_no_last_token() -> None:
    pairs = [
        TokenizedPair(prompt_ids=[1, 2], chosen_ids=[3], rejected_ids=[4, 5, 6]),
        TokenizedPair(prompt_ids=[7], chosen_ids=[8, 9], rejected_ids=[10, 11]),
    ]
    batch = pack_pairs(pairs)
    # The longer completion stands first; that of one token needs no place, as the prompt predicts it.
    assert batch.input_ids.tolist() == [[1, 2, 4, 5, 7, 8, 10]]
    assert batch.position_ids is not None and batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 1]]
    assert batch.layout is not None and batch.layout.groups == ((2, (2, 0)), (1, (1, 1)))
    assert batch.expand_index is None
    assert scored(batch) == [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    assert batch.num_tokens.tolist() == [8, 6]
    assert batch.attention_mask is None


def test_pairs_that_share_a_prompt_are_one_group_and_shared_completions_are_there_once() -> None:
    pairs = [
        TokenizedPair(prompt_ids=[1, 2], chosen_ids=[3, 4], rejected_ids=[5, 6, 7]),
        TokenizedPair(prompt_ids=[1, 2], chosen_ids=[5, 6, 7], rejected_ids=[8, 9]),
        TokenizedPair(prompt_ids=[1], chosen_ids=[3, 4], rejected_ids=[3, 4]),
    ]
    batch = pack_pairs(pairs)
    assert batch.input_ids.tolist() == [[1, 2, 5, 6, 3, 8, 1, 3]]
    assert batch.layout is not None and batch.layout.groups == ((2, (2, 1, 1)), (1, (1,)))
    assert batch.expand_index is not None
    assert len(batch.targets) == 3 + 2 + 2 + 2
    assert scored(batch) == [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]


def test_a_cached_batch_stacks_each_prompt_once_and_its_completions_in_two_blocks() -> None:
    pairs = [
        TokenizedPair(prompt_ids=[1, 2, 3], chosen_ids=[4], rejected_ids=[5, 6, 7, 8]),
        TokenizedPair(prompt_ids=[9], chosen_ids=[5, 6, 7], rejected_ids=[10, 11]),
        TokenizedPair(prompt_ids=[9], chosen_ids=[10, 11], rejected_ids=[5, 6]),
    ]
    batch = cache_pairs(pairs, pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3], [0, 0, 9]]
    assert batch.attention_mask is not None and batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.continuations is not None
    ids, masks, prompts = ([part[i].tolist() for part in batch.continuations] for i in range(3))
    assert ids == [[[5, 6, 7], [5, 6, 0]], [[10], [5], [0]]]
    assert masks == [[[1, 1, 1], [1, 1, 0]], [[1], [1], [0]]]
    assert prompts == [[0, 1], [1, 1, 0]]
    assert scored(batch) == [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]


def test_completions_of_one_token_are_predicted_by_their_prompts_alone() -> None:
    batch = cache_pairs([TokenizedPair(prompt_ids=[1, 2], chosen_ids=[3], rejected_ids=[4])], pad_id=0)
    assert batch.continuations == () and batch.logit_positions.tolist() == [0, 0]


def scored(batch: Batch) -> list[list[int]]:
    """The completions, as the batch has its model score them."""
    targets = batch.targets if batch.expand_index is None else batch.targets[batch.expand_index]
    return [part.tolist() for part in targets.split(batch.lengths.tolist())]


def texts_read(batch: Batch) -> list[list[int]]:
    """What the model has read up to each scored token, by the layout and the positions: prompt and completion."""
    if batch.continuations is not None:
        assert batch.attention_mask is not None
        rows = [row[mask == 1].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
        read = list(rows)
        for part in batch.continuations:
            for ids, prompt in zip(part.ids.tolist(), part.prompts.tolist(), strict=True):
                read += [rows[prompt] + ids[: i + 1] for i in range(len(ids))]
        return [read[i] for i in batch.logit_positions.tolist()]
    assert batch.layout is not None and batch.position_ids is not None
    row = batch.input_ids[0].tolist()
    seen: list[list[int]] = []
    at = 0
    for prompt, completions in batch.layout.groups:
        prefix = row[at : at + prompt]
        seen += [prefix[: i + 1] for i in range(prompt)]
        at += prompt
        for length in completions:
            seen += [prefix + row[at : at + i + 1] for i in range(length)]
            at += length
    assert at == len(row)
    assert [len(text) - 1 for text in seen] == batch.position_ids[0].tolist()
    return [seen[i] for i in batch.logit_positions.tolist()]


@given(pairs=_any_pairs, reading=st.sampled_from(["packed", "cached"]))
@settings(max_examples=150, deadline=None)
def test_every_scored_token_is_predicted_from_its_own_prompt_and_completion(
    pairs: list[TokenizedPair], reading: Reading
) -> None:
    batch = make_batch(pairs, 0, reading)
    read = texts_read(batch)
    places = range(len(batch.targets)) if batch.expand_index is None else batch.expand_index.tolist()
    found = [(read[i], int(batch.targets[i])) for i in places]
    expected = [
        (p.prompt_ids + completion[:t], completion[t])
        for completions in ([p.chosen_ids for p in pairs], [p.rejected_ids for p in pairs])
        for p, completion in zip(pairs, completions, strict=True)
        for t in range(len(completion))
    ]
    assert found == expected


@given(pairs=_any_pairs)
@settings(max_examples=60, deadline=None)
def test_a_packed_row_is_no_longer_than_its_distinct_prompts_and_completions(pairs: list[TokenizedPair]) -> None:
    batch = pack_pairs(pairs)
    prompts = {tuple(p.prompt_ids) for p in pairs}
    completions = {(tuple(p.prompt_ids), tuple(ids)) for p in pairs for ids in (p.chosen_ids, p.rejected_ids)}
    assert batch.input_ids.numel() == sum(map(len, prompts)) + sum(len(ids) - 1 for _, ids in completions)
    assert len(batch.targets) == sum(len(ids) for _, ids in completions)


def test_dtypes_are_those_that_models_take() -> None:
    pair = TokenizedPair(prompt_ids=[1], chosen_ids=[2], rejected_ids=[3])
    for batch in (pad_pairs([pair], pad_id=0), pack_pairs([pair, pair])):
        tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        assert {tensor.dtype for tensor in tensors.values()} == {torch.int64}
        moved = batch.to(torch.device("meta"))
        assert {name for name, value in vars(moved).items() if isinstance(value, torch.Tensor)} == set(tensors)
        assert {getattr(moved, name).device.type for name in tensors} == {"meta"}
        assert dataclasses.replace(moved).layout == batch.layout


@pytest.mark.parametrize(("budget", "sizes"), [(16, [4]), (15, [3, 1]), (8, [2, 2]), (7, [1] * 4), (1, [1] * 4)])
def test_the_budget_is_met_exactly(budget: int, sizes: list[int]) -> None:
    pairs = [TokenizedPair(prompt_ids=[1], chosen_ids=[2], rejected_ids=[3])] * 4
    assert [len(batch) for batch in plan_batches(pairs, budget, "padded")] == sizes
