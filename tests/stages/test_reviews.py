"""The review grammar, its exact reward, and the best reward that a given KL allows."""

import math
import random
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.demo import reviews

GRIPES = (
    "We saw it on Monday at the old cinema. The acting was superb. Its plot felt not boring. "
    "The music seemed quite ordinary. I want my money back."
)

seeds = st.integers(min_value=0, max_value=2**32 - 1)
reward_lists = st.lists(st.integers(min_value=-5, max_value=5), min_size=1, max_size=40)


def drawn(seed: int) -> reviews.Review:
    return reviews.sample_review(random.Random(seed))


def sentences_of(reply: str) -> list[str]:
    return [sentence.text for sentence in reviews.parse(reply)]


def test_prompts_are_distinct_and_readable() -> None:
    prompts = reviews.all_prompts()
    assert len(set(prompts)) == len(prompts) == 1600
    assert "Review the film called The Silent River." in prompts


@given(seeds)
def test_every_sampled_review_is_grammatical_within_bounds_and_asks_a_known_prompt(seed: int) -> None:
    review = drawn(seed)
    assert reviews.is_grammatical(review.reply)
    assert -5 <= reviews.true_reward(review.reply) <= 5
    assert review.prompt in reviews.all_prompts()


def test_each_sentence_scores_as_its_adjective_and_not_flips_it() -> None:
    read = [(sentence.part, sentence.score) for sentence in reviews.parse(GRIPES)]
    judgements = [("judgement", 1), ("judgement", 1), ("judgement", 0)]
    assert read == [("opener", 0), *judgements, ("closer", -1)]
    assert reviews.true_reward(GRIPES) == 1


@given(seeds, st.integers(min_value=0), st.sampled_from(["So it goes.", "The was superb.", "superb superb."]))
def test_a_sentence_that_the_grammar_cannot_produce_scores_minus_one(seed: int, at: int, broken: str) -> None:
    reply = drawn(seed).reply
    texts, scores = sentences_of(reply), [sentence.score for sentence in reviews.parse(reply)]
    at %= len(texts)
    corrupted = " ".join([*texts[:at], broken, *texts[at + 1 :]])
    assert reviews.true_reward(corrupted) == reviews.true_reward(reply) - scores[at] - 1
    assert not reviews.is_grammatical(corrupted)


@given(seeds)
def test_a_flipped_judgement_changes_sign(seed: int) -> None:
    texts = sentences_of(drawn(seed).reply)
    plain = re.sub(r" (not|quite|truly) ", " ", texts[1])
    negated = re.sub(r" (was|felt|seemed) ", r" \1 not ", plain)
    rewards = [reviews.true_reward(" ".join([texts[0], text, *texts[2:]])) for text in (plain, negated)]
    rest = reviews.true_reward(" ".join([texts[0], "nonsense.", *texts[2:]])) + 1
    assert rewards[0] - rest == -(rewards[1] - rest)


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("", 0),
        (" \n ", 0),
        ("superb brilliant delightful charming superb", -1),
        ("superb. superb. superb.", -3),
        ("It runs for two hours.", 0),
        ("It runs for two hours. The plot was superb", -1),
        ("It runs for two hours. It runs for two hours. The plot was superb. The plot was superb.", -1),
        ("It runs for two hours. The plot was not quite superb. The plot was superb. I loved every minute.", 1),
    ],
)
def test_broken_replies_are_scored_and_not_grammatical(reply: str, reward: int) -> None:
    assert reviews.true_reward(reply) == reward
    assert not reviews.is_grammatical(reply)


def test_no_reply_scores_above_five_by_going_on() -> None:
    praise = ["The plot was superb."] * 9
    for count in range(10):
        reply = " ".join(["It runs for two hours.", *praise[:count], "I loved every minute."])
        assert reviews.true_reward(reply) == 1 + min(count, 4) - max(count - 4, 0)
        assert reviews.is_grammatical(reply) == (2 <= count <= 4)


def test_white_space_around_sentences_is_free() -> None:
    spread = "\n" + GRIPES.replace(". ", ".\n\n  ") + "  "
    assert reviews.is_grammatical(spread)
    assert reviews.true_reward(spread) == reviews.true_reward(GRIPES)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=200))
def test_any_text_has_a_reward_between_minus_its_sentences_and_five(text: str) -> None:
    assert -len(reviews.parse(text)) <= reviews.true_reward(text) <= 5


@given(st.integers(min_value=-300, max_value=300), st.integers(min_value=-300, max_value=300))
def test_preferences_are_complementary_and_those_of_bradley_and_terry(one: int, other: int) -> None:
    chance = reviews.preference_probability(one, other)
    assert chance + reviews.preference_probability(other, one) == pytest.approx(1)
    assert (chance > 0.5) == (one > other)
    assert reviews.preference_probability(3, 1) == pytest.approx(math.exp(3) / (math.exp(3) + math.exp(1)))


@given(st.integers(min_value=1, max_value=30), st.integers(min_value=1, max_value=30), st.floats(0.1, 20))
def test_the_frontier_of_two_points_is_the_closed_form(num_low: int, num_high: int, beta: float) -> None:
    point = reviews.optimum([0] * num_low + [1] * num_high, beta)
    p = num_high / (num_low + num_high)
    q = p * math.exp(1 / beta) / (1 - p + p * math.exp(1 / beta))
    assert point.reward == pytest.approx(q, rel=1e-9)
    # Below 1e-300 the term is 0, which the product cannot say.
    rest = (1 - q) * math.log((1 - q) / (1 - p)) if q < 1 else 0.0
    assert point.kl == pytest.approx(q * math.log(q / p) + rest, rel=1e-6, abs=1e-9)


@given(reward_lists)
def test_a_smaller_beta_buys_reward_with_kl(rewards: list[int]) -> None:
    points = [reviews.optimum(rewards, beta) for beta in (100, 10, 1, 0.5, 0.1, 1e-6)]
    for gentle, eager in pairwise(points):
        assert eager.kl >= gentle.kl - 1e-9
        assert eager.reward >= gentle.reward - 1e-9
    assert points[-1].reward == pytest.approx(max(rewards))
    assert points[-1].kl == pytest.approx(math.log(len(rewards) / rewards.count(max(rewards))), abs=1e-9)


@given(reward_lists, st.floats(0.3, 10))
def test_the_optimum_at_a_points_kl_is_that_point(rewards: list[int], beta: float) -> None:
    point = reviews.optimum(rewards, beta)
    assert reviews.optimum_at_kl(rewards, point.kl).reward == pytest.approx(point.reward, abs=1e-3)


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_no_other_weighting_of_the_replies_has_more_reward_at_its_kl(raw: list[float]) -> None:
    rewards = [-1, 0, 2]
    weights = [weight / sum(raw) for weight in raw]
    kl = sum(weight * math.log(3 * weight) for weight in weights)
    reward = sum(weight * reward for weight, reward in zip(weights, rewards, strict=True))
    assert reward <= reviews.optimum_at_kl(rewards, max(kl, 0)).reward + 1e-3


def test_a_kl_out_of_reach_gives_the_best_reward_and_none_gives_the_mean() -> None:
    assert reviews.optimum_at_kl([0, 0, 3], 50).reward == pytest.approx(3)
    assert reviews.optimum_at_kl([0, 0, 3], 0).reward == pytest.approx(1, abs=1e-3)
