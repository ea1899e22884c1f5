"""Write short reviews from a small grammar, and score them exactly.

The embedded default trains on these: a prompt asks for a review of a film, a book, a play or an album, and the
reply is an opener, two to four judgements and a closer. Since the grammar is known, so is the *true reward* of any
reply, including the broken ones that a model writes. That makes three things computable which on human preferences
are not: the accuracy that no model can exceed (the labels are noisy on purpose), whether a policy ranks as the truth
does rather than as the noise, and how much reward the best policy has at a given KL from the reference.

The true reward counts broken sentences as bad ones. Without that a policy may collect praising words without
grammar and score above every real review, while its preference accuracy still looks fine.

Pure standard library: nothing here knows of models or tokens.
"""

import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "FrontierPoint",
    "Kind",
    "Review",
    "Sentence",
    "accuracy_ceiling",
    "all_prompts",
    "all_titles",
    "is_grammatical",
    "optimal_at_kl",
    "optimal_frontier",
    "parse",
    "preference_probability",
    "prompt_for",
    "sample_review",
    "true_reward",
]

MIN_JUDGEMENTS = 2


MAX_JUDGEMENTS = 4


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Something to review, with the sentences and nouns that belong to it."""

    name: str
    openers: tuple[str, ...]
    """Sentences with named gaps, each to be filled from `GAPS`."""
    aspects: tuple[str, ...]


KINDS = (
    Kind(
        name="film",
        openers=("We saw it {day} at the {size} cinema.", "It runs for {count} hours."),
        aspects=("acting", "camera work", "dialogue", "music", "plot", "ending"),
    ),
    Kind(
        name="book",
        openers=("We read it {day} in the {size} library.", "It has {count} hundred pages."),
        aspects=("first chapter", "story", "prose", "plot", "main character", "ending"),
    ),
    Kind(
        name="play",
        openers=("We watched it {day} at the {size} theatre.", "It has {count} long acts."),
        aspects=("acting", "staging", "dialogue", "lighting", "second act", "ending"),
    ),
    Kind(
        name="album",
        openers=("We heard it {day} in the {size} kitchen.", "It holds {count} long songs."),
        aspects=("singing", "first song", "rhythm", "sound", "melody", "ending"),
    ),
)


GAPS = {
    "day": ("on Monday", "on Friday", "in March", "last week"),
    "size": ("small", "old", "crowded"),
    "count": ("two", "three", "four"),
}


TITLE_ADJECTIVES = (
    "Silent", "Paper", "Distant", "Golden", "Hidden", "Broken", "Winter", "Empty", "Crooked", "Patient",
    "Borrowed", "Northern", "Scarlet", "Restless", "Hollow", "Gentle", "Painted", "Second", "Wooden", "Last",
)  # fmt: skip


TITLE_NOUNS = (
    "River", "Harbour", "Bridge", "Garden", "Letter", "Mountain", "Window", "Station", "Orchard", "Lantern",
    "Island", "Mirror", "Summer", "Castle", "Road", "Clock", "Forest", "Neighbour", "Journey", "Stranger",
)  # fmt: skip


ARTICLES = ("The", "Its")


VERBS = ("was", "felt", "seemed")


INTENSIFIERS = ("quite", "truly")


ADJECTIVES = {
    1: ("superb", "brilliant", "delightful", "charming"),
    0: ("ordinary", "familiar"),
    -1: ("boring", "dreadful", "clumsy", "tedious"),
}


CLOSERS = {
    1: ("I would happily recommend it.", "I am so glad I tried it.", "I loved every minute."),
    0: ("Make of that what you will.", "That is all I can say.", "Others may see it differently."),
    -1: ("I hated every minute.", "I would not do it again.", "I want my money back."),
}


# How the grammar draws: praise and blame equally often, so that a reference trained on it has a mean reward near 0
# and room on both sides.
SCORE_WEIGHTS = {1: 0.45, 0: 0.1, -1: 0.45}


NEGATED_SHARE = 0.1


INTENSIFIED_SHARE = 0.4


@dataclass(frozen=True)
class Review:
    """A prompt and the reply that the grammar gave it; neither starts or ends with white space."""

    prompt: str
    reply: str


Part = Literal["opener", "judgement", "closer", "broken"]


@dataclass(frozen=True)
class Sentence:
    """One sentence of a reply, as the grammar reads it.

    `broken` means that the grammar has no such sentence in that place: unknown words, a missing full stop, a second
    opener, a fifth judgement, an end without a closer.
    """

    text: str
    part: Part
    score: int


def prompt_for(kind: Kind, title: str) -> str:
    return f"Review the {kind.name} called {title}."


def all_titles() -> list[str]:
    return [f"The {adjective} {noun}" for adjective in TITLE_ADJECTIVES for noun in TITLE_NOUNS]


def all_prompts() -> list[str]:
    """List every prompt that the grammar can ask, kind by kind: 4 kinds of 400 titles."""
    return [prompt_for(kind, title) for kind in KINDS for title in all_titles()]


def sample_review(rng: random.Random) -> Review:
    """Draw a prompt and a grammatical reply. The judgements of one reply are about different aspects."""
    kind = rng.choice(KINDS)
    title = f"The {rng.choice(TITLE_ADJECTIVES)} {rng.choice(TITLE_NOUNS)}"
    aspects = rng.sample(kind.aspects, rng.randint(MIN_JUDGEMENTS, MAX_JUDGEMENTS))
    sentences = [
        _fill(rng.choice(kind.openers), rng),
        *(_judge(aspect, rng) for aspect in aspects),
        rng.choice(CLOSERS[_draw_score(rng)]),
    ]
    return Review(prompt_for(kind, title), " ".join(sentences))


def _fill(opener: str, rng: random.Random) -> str:
    return opener.format_map({gap: rng.choice(choices) for gap, choices in GAPS.items()})


def _judge(aspect: str, rng: random.Random) -> str:
    chance = rng.random()
    if chance < NEGATED_SHARE:
        modifier = "not "
    elif chance < NEGATED_SHARE + INTENSIFIED_SHARE:
        modifier = f"{rng.choice(INTENSIFIERS)} "
    else:
        modifier = ""
    adjective = rng.choice(ADJECTIVES[_draw_score(rng)])
    return f"{rng.choice(ARTICLES)} {aspect} {rng.choice(VERBS)} {modifier}{adjective}."


def _draw_score(rng: random.Random) -> int:
    return rng.choices(list(SCORE_WEIGHTS), weights=list(SCORE_WEIGHTS.values()))[0]


def _one_of(choices: Iterable[str]) -> str:
    return "(?:" + "|".join(re.escape(choice) for choice in choices) + ")"


def _opener_pattern(opener: str) -> str:
    pieces = re.split(r"\{(\w+)\}", opener)  # text, gap, text, gap, ..., text
    return "".join(_one_of(GAPS[piece]) if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))


_SENTENCE = re.compile(r"[^.]*\.|[^.]+$")


_OPENER = re.compile("|".join(_opener_pattern(opener) for kind in KINDS for opener in kind.openers))


_JUDGEMENT = re.compile(
    f"{_one_of(ARTICLES)} {_one_of(aspect for kind in KINDS for aspect in kind.aspects)} {_one_of(VERBS)} "
    f"(?:(?P<modifier>{_one_of(('not', *INTENSIFIERS))}) )?"
    f"(?P<adjective>{_one_of(word for words in ADJECTIVES.values() for word in words)})\\."
)


_ADJECTIVE_SCORES = {word: score for score, words in ADJECTIVES.items() for word in words}


_CLOSER_SCORES = {text: score for score, texts in CLOSERS.items() for text in texts}


def parse(reply: str) -> list[Sentence]:
    """Read a reply sentence by sentence, in order.

    A sentence runs to its full stop. The first must be an opener, the last a closer, those between (four at most)
    judgements; whatever else stands in a place is `broken` and scores -1. White space around sentences is free, and
    the aspects of any kind may stand in any review: the reply is judged without its prompt.
    """
    texts = [text.strip() for text in _SENTENCE.findall(reply) if text.strip()]
    return [_read_sentence(text, place, len(texts) - 1) for place, text in enumerate(texts)]


def _read_sentence(text: str, place: int, last: int) -> Sentence:
    if place == 0:
        if _OPENER.fullmatch(text):
            return Sentence(text, "opener", 0)
    elif place == last:
        if text in _CLOSER_SCORES:
            return Sentence(text, "closer", _CLOSER_SCORES[text])
    elif place <= MAX_JUDGEMENTS and (match := _JUDGEMENT.fullmatch(text)):
        score = _ADJECTIVE_SCORES[match["adjective"]]
        return Sentence(text, "judgement", -score if match["modifier"] == "not" else score)
    return Sentence(text, "broken", -1)


def true_reward(reply: str) -> int:
    """Sum the scores of a reply's sentences; at most 5 (four judgements and a closer), and 0 for an empty reply."""
    return sum(sentence.score for sentence in parse(reply))


def is_grammatical(reply: str) -> bool:
    """Say whether the reply is an opener, two to four judgements and a closer, with nothing broken."""
    parts = [sentence.part for sentence in parse(reply)]
    num_judgements = len(parts) - 2
    return MIN_JUDGEMENTS <= num_judgements <= MAX_JUDGEMENTS and parts == [
        "opener",
        *["judgement"] * num_judgements,
        "closer",
    ]


def preference_probability(reward: float, other_reward: float) -> float:
    """Give the chance that a labeller prefers the first of two replies: sigma(reward - other_reward).

    The Bradley-Terry model (Biometrika 39, 1952), which DPO assumes of its labels (arXiv 2305.18290, eq. 1).
    """
    return 1.0 / (1.0 + math.exp(other_reward - reward))


def accuracy_ceiling(pairs: Iterable[tuple[float, float]]) -> float:
    """Give the accuracy that a ranker by true reward has on noisily labelled pairs.

    Args:
        pairs: True rewards of (chosen, rejected). On a tie nothing beats a coin, so it counts half.

    Raises:
        ValueError: There are no pairs.
    """
    wins = [0.5 * ((chosen > rejected) + (chosen >= rejected)) for chosen, rejected in pairs]
    if not wins:
        raise ValueError("accuracy_ceiling needs at least one pair, got none")
    return sum(wins) / len(wins)


@dataclass(frozen=True)
class FrontierPoint:
    """The best policy at one beta, as estimated from reference replies."""

    beta: float
    kl: float
    """KL(policy || reference), nats per reply."""
    reward: float
    """Expected true reward of the policy's replies."""
    effective_replies: float
    """How many equally weighted replies the estimate is worth: 1 / sum of squared weights. Trust none below 50."""


def optimal_frontier(rewards: Sequence[float], betas: Iterable[float]) -> list[FrontierPoint]:
    """Estimate what the best policy has, per beta, in KL and reward, from replies of the reference alone.

    The maximum of E[reward] - beta * KL is the policy reference * exp(reward / beta) / Z (arXiv 2305.18290, eq. 4),
    so its expectations are those of the reference's replies under self-normalized weights. Rewards of several prompts
    may be pooled where their distributions are alike, as they are in this grammar. No policy lies above the curve,
    up to the error of the estimate, which grows as `effective_replies` falls.

    Args:
        rewards: True rewards of replies drawn from the reference at temperature 1.
        betas: Positive, in reward per nat.

    Raises:
        ValueError: There are no rewards, or a beta is not positive.
    """
    return [_tilted(rewards, beta) for beta in betas]


def _tilted(rewards: Sequence[float], beta: float) -> FrontierPoint:
    if not rewards or not beta > 0:
        raise ValueError(f"the frontier needs rewards and a positive beta, got {len(rewards)} rewards, beta {beta}")
    best = max(rewards)
    # Relative to the best reward no exponent is positive, so a small beta cannot overflow.
    unnormalized = [math.exp((reward - best) / beta) for reward in rewards]
    total = math.fsum(unnormalized)
    weights = [weight / total for weight in unnormalized]
    reward = math.fsum(weight * reward for weight, reward in zip(weights, rewards, strict=True))
    # The KL of weights w to the uniform 1/n is the sum of w * log(n * w), with log w taken before rounding.
    kl = (reward - best) / beta + math.log(len(rewards) / total)
    effective = 1.0 / math.fsum(weight * weight for weight in weights)
    return FrontierPoint(beta=beta, kl=max(kl, 0.0), reward=reward, effective_replies=effective)


def optimal_at_kl(rewards: Sequence[float], kl: float) -> FrontierPoint:
    """Find the frontier's point at a given KL, in nats per reply.

    KL falls as beta grows, so the point is found by bisection on log beta. A KL that the given rewards cannot reach
    (more than log(n / times the best occurs)) gives the end of the curve, where every weight is on the best reward.

    Raises:
        ValueError: There are no rewards, or the KL is negative.
    """
    if kl < 0:
        raise ValueError(f"a KL cannot be negative, got {kl}")
    low, high = -10.0, 10.0  # log beta: from all weight on the best reward to none moved
    for _ in range(60):
        middle = (low + high) / 2
        if _tilted(rewards, math.exp(middle)).kl > kl:
            low = middle
        else:
            high = middle
    return _tilted(rewards, math.exp(high))
