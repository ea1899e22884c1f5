"""Replies of policy and reference: drawn as transformers draws them, scored as a plain forward scores them."""

import json
import math
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from pipeline.base.signals import StopFlag
from pipeline.config.reader import load_config
from pipeline.data.sources import open_source
from pipeline.replies.means import estimate, estimate_kl
from pipeline.replies.sampling import choose_prompts
from pipeline.run.reading import read_run
from support.models import make_model
from support.processes import Command
from support.runs import refshard, simple_rows, write_jsonl

MakeRun = Callable[..., Path]


def train(config: Path) -> None:
    refshard("precompute", "--config", config)
    refshard("train", "--config", config)


def replies_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]


def plain_logps(model: Any, prompt: list[int], reply: list[int]) -> float:
    """Logps of a reply from the model's own logits, alone in its batch."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + reply])).logits[0].double()
    logps = logits.log_softmax(-1)
    return sum(float(logps[len(prompt) + i - 1, token]) for i, token in enumerate(reply))


def greedy(model: Any, prompt: list[int], most: int) -> list[int]:
    """The likeliest tokens, by a loop over plain forwards."""
    reply: list[int] = []
    while len(reply) < most and reply[-1:] != [1]:
        with torch.no_grad():
            reply.append(int(model(input_ids=torch.tensor([prompt + reply])).logits[0, -1].argmax()))
    return reply


def test_prompts_are_spread_and_a_set_that_has_too_few_at_its_end_gives_earlier_ones(
    make_run: MakeRun, tmp_path: Path, tokenizer: Any
) -> None:
    one, two, three, four = simple_rows(4)
    data = write_jsonl(tmp_path / "heldout.jsonl", [one, two, three, one, one, four, four, four])
    config = load_config(make_run(data={"path": str(data)}))

    def rows(count: int) -> list[int]:
        source = open_source(config.data, "train")
        return [prompt.row for prompt in choose_prompts(source, tokenizer, config.data, count, StopFlag())]

    assert rows(2) == [0, 7]
    # Row 3 repeats row 0, and row 7 what took the place of row 4.
    assert rows(4) == [0, 1, 2, 5]
    assert rows(5) == [0, 1, 2, 5]


def test_replies_are_the_models_own_and_their_log_probs_those_of_a_plain_forward(
    make_run: MakeRun, tmp_path: Path, tokenizer: Any, model_folder: Path
) -> None:
    reference_folder = make_model(tmp_path / "reference", tokenizer, seed=3)
    # What the folder recommends must not cut the distribution short, nor bend it.
    transformers.GenerationConfig(
        eos_token_id=1, do_sample=True, top_k=1, temperature=0.3, repetition_penalty=5.0
    ).save_pretrained(reference_folder)
    held_out = write_jsonl(tmp_path / "heldout.jsonl", simple_rows(40, start=100))
    config = make_run(
        reference={"model": str(reference_folder)},
        data={"eval": {"test": {"path": str(held_out)}}},
        train={"learning_rate": "1e-2"},
    )
    train(config)
    run = tmp_path / "policy"
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (run, reference_folder)
    )

    said = refshard("generate", run, "--prompts", 5, "--max-tokens", 9, "--temperature", 0).stdout
    assert "biased" in said
    rows = replies_of(run)
    assert [row["row"] for row in rows] == [0, 9, 19, 29, 39]
    for row in rows:
        assert (row["set"], row["step"], row["temperature"], row["max_tokens"]) == ("test", 4, 0, 9)
        assert (row["prompts"], row["seed"]) == (5, 0)
        text = simple_rows(1, start=100 + row["row"])[0]["prompt"]
        prompt = tokenizer(text)["input_ids"]
        assert row["prompt"] == tokenizer.decode(prompt) == f"<s>{text}"
        for who, model in (("policy", policy), ("reference", reference)):
            ids = greedy(model, prompt, 9)
            assert row[who]["text"] == tokenizer.decode(ids, skip_special_tokens=True)
            assert row[who]["num_tokens"] == len(ids)
            assert row[who]["policy_logps"] == pytest.approx(plain_logps(policy, prompt, ids), abs=1e-3)
            assert row[who]["ref_logps"] == pytest.approx(plain_logps(reference, prompt, ids), abs=1e-3)
            assert row[who]["reward"] is row["reward_by"] is None

    said = refshard("generate", run, "--set", "train", "--prompts", 24, "--max-tokens", 12, "--seed", 1).stdout
    rows = replies_of(run)
    ratios = [row["policy"]["policy_logps"] - row["policy"]["ref_logps"] for row in rows]
    shown, error = (float(number) for number in re.findall(r"(\S+) ± (\S+) nats", said)[0])
    assert error == pytest.approx(np.std(ratios, ddof=1) / math.sqrt(24), rel=0.05)
    assert shown == pytest.approx(np.mean(ratios), abs=0.05 * error)
    assert [row["set"] for row in rows] == ["train"] * 24
    # Of a model this sharp the likeliest token alone would be far likelier.
    drawn = [row["reference"]["ref_logps"] / row["reference"]["num_tokens"] for row in rows]
    likeliest = [
        plain_logps(reference, prompt, ids) / len(ids)
        for prompt in (tokenizer(row["prompt"][3:])["input_ids"] for row in rows[:6])
        for ids in [greedy(reference, prompt, 12)]
    ]
    assert np.mean(drawn) < np.mean(likeliest) - 0.5


def test_an_adapter_is_loaded_once_from_the_newest_whole_checkpoint_and_a_reward_model_judges(
    make_run: MakeRun, tmp_path: Path, tokenizer: Any, model_folder: Path
) -> None:
    config = make_run(
        policy={"lora": {"r": 4}}, train={"learning_rate": "5e-2", "save_strategy": "steps", "save_steps": 2}
    )
    train(config)
    run = tmp_path / "policy"
    # As if it still went on, and had begun another save.
    (run / "run.json").unlink()
    (run / "checkpoint-9").mkdir()
    transformers.set_seed(5)
    judge = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**{**json.loads((model_folder / "config.json").read_text()), "num_labels": 1})
    ).eval()
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")

    said = refshard(
        "generate", run, "--prompts", 3, "--max-tokens", 9, "--temperature", 0, "--reward-model", tmp_path / "judge"
    ).stdout
    assert said.count("Loading the policy") == 1
    assert "Loading the reference" not in said
    assert "after step 4" in said
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    policy = peft.PeftModel.from_pretrained(base, run / "checkpoint-4").eval()
    rows = replies_of(run)
    for row in rows:
        assert (row["set"], row["step"], row["reward_by"]) == ("train", 4, str(tmp_path / "judge"))
        prompt = tokenizer(row["prompt"][3:])["input_ids"]
        with policy.disable_adapter():
            written = {"reference": greedy(policy, prompt, 9)}
        written["policy"] = greedy(policy, prompt, 9)
        for who, ids in written.items():
            assert row[who]["text"] == tokenizer.decode(ids, skip_special_tokens=True)
            assert row[who]["policy_logps"] == pytest.approx(plain_logps(policy, prompt, ids), abs=1e-3)
            with policy.disable_adapter():
                assert row[who]["ref_logps"] == pytest.approx(plain_logps(policy, prompt, ids), abs=1e-3)
        for who in ("policy", "reference"):
            with torch.no_grad():
                read = tokenizer(row["prompt"][3:] + row[who]["text"], return_tensors="pt")
                assert row[who]["reward"] == pytest.approx(float(judge(**read).logits), abs=1e-4)
    assert any(row["policy"]["text"] != row["reference"]["text"] for row in rows)
    rewards = [row["policy"]["reward"] for row in rows]
    assert str(estimate(rewards)) in said


def test_a_policy_that_learned_nothing_writes_what_its_reference_writes_and_its_kl_is_0(
    make_run: MakeRun, tmp_path: Path, tokenizer: Any
) -> None:
    model = make_model(tmp_path / "model", tokenizer, seed=2)
    config = make_run(policy={"model": str(model)}, train={"learning_rate": 0.0, "max_steps": 1})
    run = tmp_path / "policy"
    refshard("generate", tmp_path, check=2)
    train(config)
    assert "there are train" in refshard("generate", run, "--set", "test", check=2).stderr
    assert "KL from the reference" in refshard("generate", run, "--prompts", 16, "--max-tokens", 16).stdout
    rows = replies_of(run)
    assert len({row["reference"]["text"] for row in rows}) == len(rows) == 16
    for row in rows:
        assert row["policy"] == pytest.approx(row["reference"], abs=1e-3)
    kl = estimate_kl(read_run(run).generations)
    assert abs(kl.mean) < 1e-4
    assert kl.count == 16

    slow = Command("generate", run, "--prompts", 24, "--max-tokens", 1900)
    deadline = time.monotonic() + 200
    while "Loading the reference" not in slow.said()[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    slow.signal(signal.SIGTERM)
    assert slow.wait() == 75
    assert replies_of(run) == rows
    assert not list(run.glob("*.tmp*"))

    make_model(model, tokenizer, seed=3)
    changed = refshard("generate", run, check=78)
    assert "other weights" in changed.stderr
