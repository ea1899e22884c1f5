"""Write short reviews from a small grammar, and score them exactly.

A prompt asks for a review of a film, a book, a play or an album; the reply is an opener, two to four judgements and a
closer. The grammar gives any reply a true reward, also a broken one from a model. So figures can be computed that human
preferences don't give: the agreement with the true ranking, and the best reward at a given KL.

A broken sentence counts as a bad one. Otherwise a policy could score above every real review with praising words
without grammar, and its preference accuracy would not show it.

This module uses the standard library alone: it has no models and no tokens.
"""

import itertools
import math
import random
import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

__all__ = [
    "Optimum",
    "Review",
    "Sentence",
    "all_prompts",
    "is_grammatical",
    "optimum",
    "optimum_at_kl",
    "parse",
    "preference_probability",
    "sample_review",
    "true_reward",
]

MIN_JUDGEMENTS, MAX_JUDGEMENTS = 2, 4


OPENERS = {
    "film": ("We saw it {day} at the {size} cinema.", "It runs for {count} hours."),
    "book": ("We read it {day} in the {size} library.", "It has {count} hundred pages."),
    "play": ("We watched it {day} at the {size} theatre.", "It has {count} long acts."),
    "album": ("We heard it {day} in the {size} kitchen.", "It holds {count} long songs."),
}
"""Kind -> sentences with named gaps, which `GAPS` fills"""

ASPECTS = {
    "film": ("acting", "camera work", "dialogue", "music", "plot", "ending"),
    "book": ("first chapter", "story", "prose", "plot", "main character", "ending"),
    "play": ("acting", "staging", "dialogue", "lighting", "second act", "ending"),
    "album": ("singing", "first song", "rhythm", "sound", "melody", "ending"),
}
"""Kind -> nouns that are judged"""

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

ARTICLES, VERBS, INTENSIFIERS = ("The", "Its"), ("was", "felt", "seemed"), ("quite", "truly")

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

# Praise and blame are drawn equally often, so a reference trained on the reviews has a mean reward near 0.
SCORE_WEIGHTS = {1: 0.45, 0: 0.1, -1: 0.45}

NEGATED_SHARE, INTENSIFIED_SHARE = 0.1, 0.4


class Review(NamedTuple):
    """A prompt and the grammar's reply to it."""

    prompt: str
    reply: str


class Sentence(NamedTuple):
    """One sentence of a reply, as the grammar reads it.

    A `broken` sentence is not one of the grammar in that place: it has unknown words or no full stop, or it is a second
    opener, a fifth judgement, or an end that is not a closer.
    """

    text: str
    part: Literal["opener", "judgement", "closer", "broken"]
    score: int


def all_prompts() -> list[str]:
    """List every prompt of the grammar, kind by kind: 4 kinds of 400 titles."""
    titles = [f"The {adjective} {noun}" for adjective in TITLE_ADJECTIVES for noun in TITLE_NOUNS]
    return [_prompt_for(kind, title) for kind in OPENERS for title in titles]


def _prompt_for(kind: str, title: str) -> str:
    return f"Review the {kind} called {title}."


def sample_review(rng: random.Random) -> Review:
    """Draw a prompt and a grammatical reply. The judgements of one reply are about different aspects."""
    kind = rng.choice(list(OPENERS))
    title = f"The {rng.choice(TITLE_ADJECTIVES)} {rng.choice(TITLE_NOUNS)}"
    aspects = rng.sample(ASPECTS[kind], rng.randint(MIN_JUDGEMENTS, MAX_JUDGEMENTS))
    opener = rng.choice(OPENERS[kind]).format_map({gap: rng.choice(choices) for gap, choices in GAPS.items()})
    judgements = [_judge(aspect, rng) for aspect in aspects]
    closer = rng.choice(CLOSERS[_draw_score(rng)])
    return Review(_prompt_for(kind, title), " ".join([opener, *judgements, closer]))


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


_SENTENCE = re.compile(r"[^.]*\.|[^.]+$")

_FILLED_OPENERS = {
    opener.format_map(dict(zip(GAPS, words, strict=True)))
    for opener in itertools.chain(*OPENERS.values())
    for words in itertools.product(*GAPS.values())
}

_JUDGEMENT = re.compile(
    f"{_one_of(ARTICLES)} {_one_of(itertools.chain(*ASPECTS.values()))} {_one_of(VERBS)} "
    f"(?:(?P<modifier>{_one_of(('not', *INTENSIFIERS))}) )?"
    f"(?P<adjective>{_one_of(itertools.chain(*ADJECTIVES.values()))})\\."
)

_ADJECTIVE_SCORES = {word: score for score, words in ADJECTIVES.items() for word in words}

_CLOSER_SCORES = {text: score for score, texts in CLOSERS.items() for text in texts}


def parse(reply: str) -> list[Sentence]:
    """Read a reply sentence by sentence, in order.

    A sentence ends with its full stop. The first must be an opener, the last a closer, and those between (four at most)
    judgements; any other sentence is `broken` and scores -1. White space around sentences is ignored. A reply is read
    without its prompt, so aspects of any kind are valid.
    """
    texts = [text.strip() for text in _SENTENCE.findall(reply) if text.strip()]
    return [_read_sentence(text, place, len(texts) - 1) for place, text in enumerate(texts)]


def _read_sentence(text: str, place: int, last: int) -> Sentence:
    if place == 0:
        if text in _FILLED_OPENERS:
            return Sentence(text, "opener", 0)
    elif place == last:
        if text in _CLOSER_SCORES:
            return Sentence(text, "closer", _CLOSER_SCORES[text])
    elif place <= MAX_JUDGEMENTS and (match := _JUDGEMENT.fullmatch(text)):
        score = _ADJECTIVE_SCORES[match["adjective"]]
        return Sentence(text, "judgement", -score if match["modifier"] == "not" else score)
    return Sentence(text, "broken", -1)


def true_reward(reply: str) -> int:
    """Sum the scores of a reply's sentences: at most 5 (four judgements and a closer), 0 for an empty reply."""
    return sum(sentence.score for sentence in parse(reply))


def is_grammatical(reply: str) -> bool:
    """Return True if the reply is an opener, two to four judgements and a closer."""
    parts = "".join(sentence.part[0] for sentence in parse(reply))
    return re.fullmatch(f"oj{{{MIN_JUDGEMENTS},{MAX_JUDGEMENTS}}}c", parts) is not None


def preference_probability(reward: float, other_reward: float) -> float:
    """Give sigma(reward - other_reward), the probability that a labeller prefers the first of two replies.

    DPO assumes the Bradley-Terry model (Biometrika 39, 1952) of its labels (arXiv 2305.18290, eq. 1).
    """
    return 1.0 / (1.0 + math.exp(other_reward - reward))


class Optimum(NamedTuple):
    """The best policy at one beta, as estimated from replies of the reference."""

    kl: float
    """KL(policy || reference), nats per reply"""
    reward: float
    """Expected true reward of the policy's replies"""


def optimum(rewards: Sequence[float], beta: float) -> Optimum:
    """Estimate KL and reward of the best policy at a positive beta, from rewards of the reference at temperature 1.

    The maximum of E[reward] - beta * KL is the policy reference * exp(reward / beta) / Z (arXiv 2305.18290, eq. 4). Its
    expectations are those of the reference's replies under self-normalized weights. Rewards of several prompts may be
    pooled if their distributions are alike, as in this grammar.
    """
    best = max(rewards)
    # Relative to the best reward no exponent is positive, so a small beta can't overflow.
    unnormalized = [math.exp((reward - best) / beta) for reward in rewards]
    total = math.fsum(unnormalized)
    reward = math.fsum(weight * reward for weight, reward in zip(unnormalized, rewards, strict=True)) / total
    # The KL of weights w to the uniform 1/n is the sum of w * log(n * w), with log w taken before rounding.
    kl = (reward - best) / beta + math.log(len(rewards) / total)
    return Optimum(kl=max(kl, 0.0), reward=reward)


def optimum_at_kl(rewards: Sequence[float], kl: float) -> Optimum:
    """Find the optimum at a given KL, nats per reply, by bisection on log beta: the KL falls as beta grows.

    A KL above log(n / count of the best reward) is out of reach; it gives all weight to the best reward.
    """
    low, high = -10.0, 10.0  # log beta: from all weight on the best reward to equal weights
    for _ in range(60):
        middle = (low + high) / 2
        if optimum(rewards, math.exp(middle)).kl > kl:
            low = middle
        else:
            high = middle
    return optimum(rewards, math.exp(high))
