"""TR-DPO in windows: a reference that moves gives what an online TR-DPO gives, and no kill changes it (L10)."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from pipeline.config.reader import load_config
from pipeline.models.loading import load_policy
from pipeline.store.store import open_store
from pipeline.training.arguments import training_arguments
from pipeline.training.mixing import mix
from pipeline.training.steps import order_of_run
from pipeline.training.windows import window_at
from support.models import make_model, make_tokenizer
from support.runs import refshard, simple_rows
from support.trl_peer import CaptureWeights, load, trl_trainer
from support.windows import (
    ALPHA,
    BETA,
    EVERY,
    LORA,
    STEPS,
    history,
    losses,
    shared_arguments,
    write_inputs,
    write_run,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("windows"))


def largest_gap(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float:
    assert ours.keys() == theirs.keys()
    return max(abs(ours[step] - theirs[step]) / theirs[step] for step in ours)


class MoveReference(transformers.TrainerCallback):
    """An online TR-DPO in the open: every EVERY steps the live reference takes in what the policy stands for."""

    def __init__(self, reference: Any, *, behind: int = 0) -> None:
        self.reference = reference
        self.behind = behind
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % EVERY:
            return
        plain = copy.deepcopy(model)
        plain = plain.merge_and_unload() if isinstance(plain, peft.PeftModel) else plain
        self.seen.append({name: p.detach().clone() for name, p in plain.named_parameters()})
        if len(self.seen) > self.behind:
            weights = self.seen[-1 - self.behind]
            for name, p in self.reference.named_parameters():
                p.data.mul_(1 - ALPHA).add_(weights[name], alpha=ALPHA)


def train_trl(
    folder: Path,
    output: Path,
    *,
    lora: bool = False,
    every: int | None = EVERY,
    behind: int | None = None,
    capture: CaptureWeights | None = None,
    **train: Any,
) -> list[dict[str, float]]:
    """TRL with its reference in memory: moved by itself, or by `MoveReference` where it refuses or must be late."""
    by_hand = lora or behind is not None
    sync = {} if by_hand or every is None else {"ref_model_sync_steps": every, "ref_model_mixup_alpha": ALPHA}
    reference = load(folder / "model")
    callbacks: list[Any] = [MoveReference(reference, behind=behind or 0)] if by_hand else []
    trainer = trl_trainer(
        folder / "model",
        simple_rows(38),
        make_tokenizer(bos=True),
        reference=reference,
        lora=LORA if lora else None,
        held_out=simple_rows(6, start=100),
        callbacks=[*callbacks, capture] if capture else callbacks,
        output_dir=str(output),
        beta=BETA,
        max_length=128,
        sync_ref_model=bool(sync),
        **sync,
        **shared_arguments(**train),
    )
    trainer.train()
    entries: list[dict[str, float]] = trainer.state.log_history
    return entries


@pytest.fixture(scope="module")
def windowed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of full fine-tuning, whose reference moved three times."""
    output = tmp_path_factory.mktemp("windowed")
    refshard("train", "--config", write_run(folder, output, {"steps": EVERY, "mixup_alpha": ALPHA}))
    return output


def test_windows_give_what_trl_gives_with_its_reference_in_memory(folder: Path, windowed: Path, tmp_path: Path) -> None:
    theirs = train_trl(folder, tmp_path / "trl")
    ours = history(windowed)
    assert len(losses(ours)) == STEPS > 3 * EVERY
    # The reference must have moved far enough for its moves to be seen, and training away from ln 2.
    still = losses(train_trl(folder, tmp_path / "still", every=None))
    assert largest_gap(losses(theirs), still) > 1e-2
    print(
        "largest gaps",
        largest_gap(losses(ours), losses(theirs)),
        largest_gap(losses(ours, "grad_norm"), losses(theirs, "grad_norm")),
    )
    assert largest_gap(losses(ours), losses(theirs)) < 1e-5
    assert largest_gap(losses(ours, "grad_norm"), losses(theirs, "grad_norm")) < 1e-5
    # Steps 4, 8 and 12 are evaluated on the reference that has just moved.
    assert {2, 4, 6, 8, 10, 12, 14} == losses(ours, "eval_loss").keys()
    assert largest_gap(losses(ours, "eval_loss"), losses(theirs, "eval_loss")) < 1e-5
    for key in ("rewards/chosen", "rewards/rejected", "logps/chosen", "eval_rewards/chosen", "eval_logps/rejected"):
        for step, value in losses(ours, key).items():
            assert value == pytest.approx(losses(theirs, key)[step], rel=1e-4, abs=2e-4), key


def test_the_card_says_that_the_reference_moved(windowed: Path, folder: Path) -> None:
    card = (windowed / "policy" / "README.md").read_text()
    assert f"`{folder / 'model'}, moved toward the policy every {EVERY} steps (alpha {ALPHA})`" in card
    assert "references/step" not in card
    assert "eval_loss" in card and "_time" not in card


def test_what_scoring_every_window_took_is_written_down(windowed: Path) -> None:
    costs = json.loads((windowed / "policy" / "inputs.json").read_text())["stage_one"]
    # Four windows, each with the pairs of its own steps; the held-out ones before each.
    assert [cost["pairs"] for cost in costs if cost["set"] == "test"] == [6] * 4
    assert len([cost for cost in costs if cost["set"] == "train"]) == 4


@pytest.mark.parametrize("control", [{"every": EVERY + 1}, {"behind": 1}], ids=["a step late", "a window stale"])
def test_a_reference_that_is_late_would_be_seen(
    folder: Path, windowed: Path, tmp_path: Path, control: dict[str, int]
) -> None:
    theirs = train_trl(folder, tmp_path / "trl", **control)
    assert largest_gap(losses(history(windowed)), losses(theirs)) > 1e-3


def test_moving_by_hand_is_what_trl_does(folder: Path, tmp_path: Path) -> None:
    """The adapters' comparison and the stale control stand on this."""
    by_trl = train_trl(folder, tmp_path / "a")
    by_hand = train_trl(folder, tmp_path / "b", behind=0)
    assert losses(by_trl) == losses(by_hand)


def test_with_an_adapter_the_reference_moves_to_what_the_adapter_stands_for(folder: Path, tmp_path: Path) -> None:
    """TRL refuses to sync with adapters; its loss with a reference that is moved by hand is the peer."""
    train = {"learning_rate": 5e-2}
    refshard(
        "train", "--config", write_run(folder, tmp_path, {"steps": EVERY, "mixup_alpha": ALPHA}, lora=True, **train)
    )
    theirs = train_trl(folder, tmp_path / "trl", lora=True, **train)
    assert min(losses(theirs).values()) < 0.68
    assert largest_gap(losses(history(tmp_path)), losses(theirs)) < 1e-5
    assert largest_gap(losses(history(tmp_path), "eval_loss"), losses(theirs, "eval_loss")) < 1e-5


def test_under_adamw_the_losses_on_captured_weights_are_trls(folder: Path, tmp_path: Path) -> None:
    """Every window's reference, mixed by us from TRL's weights, gives TRL's losses on TRL's batches."""
    capture = CaptureWeights()
    theirs = losses(train_trl(folder, tmp_path / "trl", capture=capture, optim="adamw_torch", learning_rate=5e-4))
    config_file = write_run(folder, tmp_path, {"steps": EVERY, "mixup_alpha": ALPHA})
    config = load_config(config_file)
    order = order_of_run(training_arguments(config), 38)
    model = load_policy(config)
    rows = simple_rows(38)
    tokenizer = make_tokenizer(bos=True)
    previous = None
    references = [load(folder / "model")]
    for step in range(EVERY, STEPS, EVERY):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(capture.weights[step][name])
        model.save_pretrained(tmp_path / f"policy-{step}")
        target = tmp_path / f"reference-{step}"
        mix(config, checkpoint=tmp_path / f"policy-{step}", previous=previous, target=target, made_from={"step": step})
        references.append(load(target))
        previous = target

    def plain_margins(scored: Any, indices: Sequence[int]) -> list[float]:
        margins = []
        for i in indices:
            sums = []
            for side in ("chosen", "rejected"):
                prompt = tokenizer(rows[i]["prompt"]).input_ids
                ids = tokenizer(rows[i]["prompt"] + rows[i][side] + tokenizer.eos_token).input_ids
                logps = torch.log_softmax(scored(torch.tensor([ids])).logits[0].double(), dim=-1)
                sums.append(sum(logps[at - 1, ids[at]].item() for at in range(len(prompt), len(ids))))
            margins.append(sums[0] - sums[1])
        return margins

    for step in range(STEPS):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(capture.weights[step][name])
            indices = order.steps[step].tolist()
            policy, reference = (plain_margins(m, indices) for m in (model, references[step // EVERY]))
        per_pair = [np.log1p(np.exp(-BETA * (p - r))) for p, r in zip(policy, reference, strict=True)]
        # The mean of the micro-batches' means, as the library adds them up.
        micro = [np.mean(per_pair[i : i + 4]) for i in range(0, len(per_pair), 4)]
        assert np.mean(micro) == pytest.approx(theirs[step + 1], rel=1e-5), step


def test_only_the_next_windows_pairs_are_scored(folder: Path, tmp_path: Path) -> None:
    config_file = write_run(folder, tmp_path, {"steps": 2, "mixup_alpha": ALPHA}, eval_strategy="no")
    config = load_config(config_file)
    refshard("precompute", "--config", config_file)
    store = open_store(tmp_path / "shards" / "train")
    order = order_of_run(training_arguments(config), 38)
    wanted = set(order.pairs_of(0, 2).tolist())
    assert len(wanted) == 24
    assert store.index["totals"]["kept"] == 24
    assert not (tmp_path / "shards" / "test").exists()
    # One window by hand, as a scheduler would run it, then the next one's scoring.
    refshard("train", "--config", config_file, "--one-window")
    refshard("precompute", "--config", config_file)
    moved = tmp_path / "policy" / "references" / "step-00000002"
    assert open_store(moved / "shards" / "train").index["totals"]["kept"] == len(order.pairs_of(2, 4))
    assert not (moved / "shards" / "test").exists()


@pytest.mark.parametrize("epochs", [1.0, 2.5])
def test_the_order_is_that_of_the_trainer(folder: Path, tmp_path: Path, epochs: float) -> None:
    """Through epochs that end in the middle of an accumulation; a wrong order stops the run at an unscored pair."""
    changes = {"max_steps": -1, "num_train_epochs": epochs, "eval_strategy": "epoch"}
    config_file = write_run(folder, tmp_path, {"steps": 1, "mixup_alpha": 1.0}, **changes)
    order = order_of_run(training_arguments(load_config(config_file)), 38)
    assert order.steps_per_epoch == 4
    assert [len(step) for step in order.steps[:4]] == [12, 12, 12, 2]
    assert sorted(np.concatenate(order.steps[:4]).tolist()) == list(range(38))
    refshard("train", "--config", config_file)
    entries = history(tmp_path)
    assert len(losses(entries)) == len(order.steps) == int(4 * epochs)
    # L10, alpha 1: the first step of every window has its reference's own weights.
    assert list(losses(entries).values()) == pytest.approx([np.log(2)] * len(order.steps), abs=1e-5)
    assert losses(entries, "eval_loss").keys() == {4, 8, 10} & set(range(len(order.steps) + 1))


def test_with_alpha_0_nothing_moves(folder: Path, tmp_path: Path) -> None:
    """L10: the same losses as without windows."""
    refshard("train", "--config", write_run(folder, tmp_path / "moving", {"steps": EVERY, "mixup_alpha": 0.0}))
    plain = write_run(folder, tmp_path / "plain", None)
    refshard("precompute", "--config", plain)
    refshard("train", "--config", plain)
    for key in ("loss", "eval_loss"):
        assert largest_gap(losses(history(tmp_path / "moving"), key), losses(history(tmp_path / "plain"), key)) < 1e-6


def test_another_architecture_is_refused_before_it_is_mixed(folder: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", make_tokenizer(bos=True), intermediate_size=48)
    config = write_run(folder, tmp_path, {"steps": 2, "mixup_alpha": ALPHA})
    arguments = ["--config", config, "-o", f"reference.model={other}"]
    done = refshard("train", *arguments, check=2)
    assert "reference.sync" in done.stderr and "shape" in done.stderr


@pytest.mark.parametrize(
    ("total", "evaluates", "expected"),
    [
        (8, False, [(0, 0, 4, False), (1, 4, 8, True)]),
        (8, True, [(0, 0, 4, False), (1, 4, 8, False), (2, 8, 8, True)]),
        (9, False, [(0, 0, 4, False), (1, 4, 8, False), (2, 8, 9, True)]),
        (3, True, [(0, 0, 3, True)]),
    ],
)
def test_windows_cover_every_step_and_the_last_evaluation(
    folder: Path, tmp_path: Path, total: int, evaluates: bool, expected: list[tuple[int, int, int, bool]]
) -> None:
    config_file = write_run(
        folder, tmp_path, {"steps": 4}, max_steps=total, eval_strategy="steps" if evaluates else "no", eval_steps=3
    )
    # Without held-out pairs, and with those that `no` leaves out, no window is for an evaluation.
    config = load_config(config_file, [] if evaluates or total % 2 else ["data.eval={}"])
    arguments = training_arguments(config)
    order = order_of_run(arguments, 38)
    windows = [window_at(config, arguments, order, Path(f"checkpoint-{4 * number}")) for number in range(len(expected))]
    assert window_at(config, arguments, order, None) == windows[0]
    assert [(w.number, w.first, w.last, w.is_last) for w in windows] == expected
    evaluated = {step for w in windows for step in w.evaluations}
    assert evaluated == ({*range(3, total, 3), total} if evaluates else set())
    assert window_at(config, arguments, order, Path("checkpoint-396")) == windows[-1]


def test_an_adapter_on_shared_embeddings_is_refused(folder: Path, tmp_path: Path) -> None:
    tied = make_model(tmp_path / "tied", make_tokenizer(bos=True), tie_word_embeddings=True)
    config = write_run(folder, tmp_path, {"steps": EVERY})
    model = ["-o", f"policy.model={tied}", "-o", "policy.lora.target_modules=[q_proj]"]
    refused = refshard("train", "--config", config, *model, "-o", "policy.lora.modules_to_save=[embed_tokens]", check=2)
    assert "tied to the head" in refused.stderr
    refshard("precompute", "--config", config, *model)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.num_train_epochs=0", "num_train_epochs: must be positive"),
        ("train.dataloader_drop_last=true", "dataloader_drop_last: must be false with fewer pairs than one batch"),
        ("train.train_sampling_strategy=group_by_length", "got group_by_length"),
        ("train.save_strategy=best", "metric_for_best_model"),
        ("train.save_total_limit=1", "at least 2"),
        ("train.include_num_input_tokens_seen=all", "can't be set"),
    ],
)
def test_settings_that_no_window_can_be_made_of_are_refused(
    folder: Path, tmp_path: Path, override: str, words: str
) -> None:
    changes: dict[str, Any] = {"max_steps": -1, "per_device_train_batch_size": 64}
    config = write_run(folder, tmp_path, {"steps": EVERY}, **changes)
    assert words in refshard("precompute", "--config", config, "-o", override, check=2).stderr
