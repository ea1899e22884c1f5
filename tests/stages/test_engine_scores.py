"""Log-probs from vLLM's and SGLang's answers: which token each belongs to, what is refused, how far they are off."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.base.errors import ConfigError, DataError
from pipeline.config.reader import load_config
from pipeline.data.intake import KeptPair
from pipeline.data.tokens import TokenizedPair
from pipeline.models.files import load_tokenizer
from pipeline.scoring.scorer import load_scorer
from pipeline.store.store import open_store, read_parts
from stages.import_scores import command
from stages.import_scores.engines import is_answer, logps_of_answer
from support.runs import kept, simple_rows, write_jsonl

MakeRun = Callable[..., Path]
Captured = pytest.CaptureFixture[str]

PROMPT, CHOSEN = [5, 6, 7], [8, 2]
LOGPS = [-0.1, -0.2, -0.3, -0.4]
"""Of the second token to the last: an engine gives none for the first"""
PAIR = KeptPair(
    row=0, place="a.jsonl:1", key=b"", pair=TokenizedPair(prompt_ids=PROMPT, chosen_ids=CHOSEN, rejected_ids=[9])
)


def vllm(ids: list[int], logps: list[float]) -> list[Any]:
    """vLLM's prompt_logprobs, as it answers to prompt_logprobs: 0."""
    return [
        None,
        *({str(i): {"logprob": p, "rank": 3, "decoded_token": "t"}} for i, p in zip(ids[1:], logps, strict=True)),
    ]


def sglang(ids: list[int], logps: list[float], start: int = 0) -> dict[str, Any]:
    """SGLang's answer to return_logprob: true, logprob_start_len: START."""
    entries = [[p, i, None] for i, p in zip(ids, [None, *logps], strict=True)][start:]
    return {
        "text": "",
        "meta_info": {"prompt_tokens": len(ids), "input_token_logprobs": [[None, *entries[0][1:]], *entries[1:]]},
    }


def with_likeliest(entries: list[Any]) -> list[Any]:
    """vLLM's answer to prompt_logprobs: 1: the likeliest token beside the prompt's own, in any order."""
    return [entry and {"77": {"logprob": -0.01, "rank": 1}, **entry} for entry in entries]


IDS = [*PROMPT, *CHOSEN]
ANSWERS = {
    "vllm's list": vllm(IDS, LOGPS),
    "vllm's list as text": json.dumps(vllm(IDS, LOGPS)),
    "vllm's completion": {"choices": [{"text": "", "prompt_logprobs": vllm(IDS, LOGPS)}]},
    "vllm's chat completion": {"choices": [{"message": {}}], "prompt_logprobs": vllm(IDS, LOGPS)},
    "vllm's completion with ids": {
        "choices": [{"prompt_logprobs": with_likeliest(vllm(IDS, LOGPS)), "prompt_token_ids": IDS}]
    },
    "sglang's answer": sglang(IDS, LOGPS),
    "sglang's answer from the prompt's last token": sglang(IDS, LOGPS, start=2),
    "sglang's list": sglang(IDS, LOGPS)["meta_info"]["input_token_logprobs"],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_completion_s_tokens_begin_after_the_prompt_s(name: str) -> None:
    assert is_answer(ANSWERS[name])
    assert logps_of_answer(ANSWERS[name], PAIR, CHOSEN, "c", 100) == [-0.3, -0.4]


@pytest.mark.parametrize("value", [-3.0, [-1.0, -2.0], None, [None, -1.0], "-3", "[a text]", []])
def test_numbers_lists_of_numbers_and_texts_are_no_answers(value: Any) -> None:
    assert not is_answer(value)


OTHER_PROMPT, NO_EOS, ONE_MORE = [5, 60, 7, 8, 2], [5, 6, 7, 8], [5, 6, 7, 8, 2, 3]
REFUSED = {
    "another token in the prompt": (vllm(OTHER_PROMPT, LOGPS), "token 1 must be 6, as refshard tokenizes"),
    "another token at the end": (sglang([*IDS[:-1], 3], LOGPS), "token 4 must be 2, as refshard tokenizes .* got 3"),
    "no EOS": (vllm(NO_EOS, LOGPS[:3]), "must hold the pair's 5 tokens, got 4. Send .* EOS"),
    "one token more": (sglang(ONE_MORE, [*LOGPS, -0.5]), "must hold the pair's 5 tokens, got 6"),
    "several tokens and no ids": (with_likeliest(vllm(IDS, LOGPS)), "token 1 must be one, got 2. Ask vLLM"),
    "ids of another prompt": (
        {"choices": [{"prompt_logprobs": vllm(IDS, LOGPS), "prompt_token_ids": OTHER_PROMPT}]},
        "token 1 must have a log-prob under its id 60, got 6",
    ),
    "too few ids": (
        {"prompt_logprobs": vllm(IDS, LOGPS), "prompt_token_ids": IDS[:3]},
        "prompt_token_ids must be 5 ids",
    ),
    "from the completion's first token": (sglang(IDS, LOGPS, start=3), "Ask for logprob_start_len below 3"),
    "from within the completion": (sglang(IDS, LOGPS, start=4), "Ask for logprob_start_len below 3"),
    "a null amid the tokens": (vllm(IDS, [*LOGPS[:2], None, -0.4]), "logprob_start_len below 3"),  # type: ignore[list-item]
    "minus infinity": (vllm(IDS, [*LOGPS[:3], -9999.0]), "token 4 must have a finite log-prob"),
    "no log-probs of the prompt, vllm": ({"choices": [{"text": "x"}]}, "Ask vLLM for prompt_logprobs: 0"),
    "no log-probs of the prompt, sglang": ({"meta_info": {"prompt_tokens": 5}}, "Ask for return_logprob: true"),
    "numbers in place of answers": ([-1.0, -2.0], "must be the answer of an engine, as in the first row"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_answer_of_other_tokens_or_without_a_log_prob_is_refused_by_row(name: str) -> None:
    answer, words = REFUSED[name]
    with pytest.raises(DataError, match=rf"^a\.jsonl:1: column 'c': .*{words}"):
        logps_of_answer(answer, PAIR, CHOSEN, "c", 100)


def test_sglang_s_0_may_stand_for_the_last_id_of_the_vocabulary() -> None:
    """Its scheduler writes `x if x < vocab_size - 1 else 0`, against the hashes that stand for pictures."""
    answer, last = sglang([*PROMPT, 0, 2], LOGPS), [99, 2]
    assert logps_of_answer(answer, PAIR, last, "c", 100) == [-0.3, -0.4]
    for other, vocabulary in ((answer, 101), (vllm([*PROMPT, 0, 2], LOGPS), 100)):
        with pytest.raises(DataError, match="token 3 must be 99, as refshard tokenizes the pair, got 0"):
            logps_of_answer(other, PAIR, last, "c", vocabulary)


def test_an_answer_may_hold_the_tokens_that_max_length_cuts() -> None:
    cut = KeptPair(row=0, place="a.jsonl:1", key=b"", pair=PAIR.pair, truncated=True)
    assert logps_of_answer(vllm(IDS, LOGPS), cut, CHOSEN[:1], "c", 100) == [-0.3]
    with pytest.raises(DataError, match="got 4"):
        logps_of_answer(vllm(IDS[:4], LOGPS[:3]), cut, CHOSEN, "c", 100)


@pytest.mark.parametrize(("off", "agrees"), [(0.0, True), (0.25, False)])
def test_the_import_stores_an_engine_s_log_probs_and_says_how_far_the_reference_is(
    make_run: MakeRun, tmp_path: Path, capsys: Captured, off: float, agrees: bool
) -> None:
    rows = simple_rows(5)
    config = load_config(make_run(rows))
    pairs = [found.pair for found in kept(config)]
    with load_scorer(config, load_tokenizer(config), tokens_per_batch=512) as scorer:
        scored = {i: both for i, *both in scorer.logps(pairs)}
    answers = []
    for i, pair in enumerate(pairs):
        # Only the chosen completion is off, so that each margin is off by as much as its tokens come to.
        both = zip((pair.chosen_ids, pair.rejected_ids), (scored[i][0] - np.float32(off), scored[i][1]), strict=True)
        of_pair = []
        for ids, logps in both:
            whole = [*pair.prompt_ids, *ids]
            of_pair.append((whole, [*[-9.0] * (len(pair.prompt_ids) - 1), *map(float, logps)]))
        answers.append({"c": vllm(*of_pair[0]), "r": sglang(*of_pair[1])})
    file = write_jsonl(tmp_path / "s.jsonl", [{**row, **both} for row, both in zip(rows, answers, strict=True)])
    command.run(config, file, set_name="train", chosen="c", rejected="r", sample=3)
    said = capsys.readouterr().out
    [number] = re.findall(r"Compared with 3 pairs scored here: token log-probs differ by (\S+) nats on average", said)
    sample = [0, 2, 4]
    tokens = [(len(pairs[i].chosen_ids), len(pairs[i].rejected_ids)) for i in sample]
    share = sum(chosen for chosen, _ in tokens) / sum(map(sum, tokens))
    assert float(number) == pytest.approx(off * share, rel=0.05, abs=1e-6)
    assert ("the parity gate stops" in said) != agrees
    shifts = [0.1 * off * chosen for chosen, _ in tokens]
    assert f"{np.sqrt(np.mean(np.square(shifts))):.2g} away from 0" in said or agrees
    stored = [row for part in read_parts(open_store(tmp_path / "shards" / "train")) for row in part.to_pylist()]
    for i, row in enumerate(stored):
        assert row["chosen_token_logps"] == (scored[i][0] - np.float32(off)).tolist()
        assert row["rejected_token_logps"] == scored[i][1].tolist()


def test_a_file_without_a_known_ending_is_refused_by_its_own_name(make_run: MakeRun, tmp_path: Path) -> None:
    config = load_config(make_run(simple_rows(1), reference={"declared": "judge"}))
    file = write_jsonl(tmp_path / "answers.txt", simple_rows(1))
    with pytest.raises(ConfigError, match=r"^\S+/answers\.txt: must be a Parquet or a JSON Lines file, which ends in"):
        command.run(config, file, set_name="train", chosen="c", rejected="r")


def test_a_reference_known_by_name_is_not_compared(make_run: MakeRun, tmp_path: Path, capsys: Captured) -> None:
    rows = simple_rows(1)
    config = load_config(make_run(rows, reference={"declared": "judge"}))
    [found] = kept(config)
    sides = {"c": found.pair.chosen_ids, "r": found.pair.rejected_ids}
    answers = {
        name: sglang([*found.pair.prompt_ids, *ids], [-1.0] * (len(found.pair.prompt_ids) + len(ids) - 1))
        for name, ids in sides.items()
    }
    file = write_jsonl(tmp_path / "s.jsonl", [{**rows[0], **answers}])
    command.run(config, file, set_name="train", chosen="c", rejected="r")
    assert "Not compared: the reference is known by name alone" in capsys.readouterr().out
