"""A template that asks for today's date is told the one that the settings fix, in the way the library tells it."""

import datetime

from pipeline.data.dates import asks_for_date
from pipeline.data.pairs import Message, Pair
from pipeline.data.rendering import apply_template
from pipeline.data.tokens import tokenize
from support.models import make_tokenizer

TODAY = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }} {% endif %}"
PLAIN = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
TURNS: list[Message] = [{"role": "user", "content": "Hi"}]


def told(tokenizer: object, date: str | None) -> str:
    ((text, _),) = apply_template(tokenizer, [(TURNS, False)], {"tools": None}, date)  # type: ignore[arg-type]
    return text


def test_the_date_is_the_given_one_and_the_clocks_without() -> None:
    tokenizer = make_tokenizer(template=TODAY + PLAIN)
    assert asks_for_date(tokenizer)
    today = f"{datetime.datetime.now():%d %b %Y} Hi "
    assert told(tokenizer, "2024-07-26") == "26 Jul 2024 Hi "
    assert told(tokenizer, None) == today
    assert told(tokenizer, "1999-12-31") == "31 Dec 1999 Hi "
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == today


def test_each_of_several_templates_is_told() -> None:
    tokenizer = make_tokenizer(template=PLAIN)
    assert not asks_for_date(tokenizer)
    assert told(tokenizer, "2024-07-26") == "Hi "
    tokenizer.chat_template = {"default": PLAIN, "tool_use": TODAY + PLAIN}
    assert asks_for_date(tokenizer)
    ((text, _),) = apply_template(tokenizer, [(TURNS, False)], {"tools": [{"name": "f"}]}, "2024-07-26")
    assert text == "26 Jul 2024 Hi "


def test_a_pairs_tokens_are_those_of_the_date() -> None:
    tokenizer = make_tokenizer(template=TODAY + PLAIN)
    pair = Pair(
        prompt=TURNS, chosen=[{"role": "assistant", "content": "A"}], rejected=[{"role": "assistant", "content": "B"}]
    )
    one, other = (tokenize(pair, tokenizer, "row", date) for date in ("2024-07-26", "2024-07-27"))
    assert one != other
    assert tokenizer.decode(one.prompt_ids) == "26 Jul 2024 Hi "
