"""The laws, through the real commands: what must be equal, whatever the numbers are."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.reader import load_config
from pipeline.models.loading import load_policy
from pipeline.scoring.forward import prepare, score
from pipeline.scoring.packing import pad_pairs
from support.models import make_model
from support.runs import kept, logged_steps, refshard, simple_rows, write_jsonl
from support.stores import digests, stored_rows
from support.watched import Watched, start_ranks

pytestmark = pytest.mark.slow

MakeRun = Callable[..., Path]


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["full", "lora"])
def test_training_starts_at_ln_2_and_leaves_it_while_the_shards_stay(
    make_run: MakeRun, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    """L1 and L2."""
    config = make_run(train={"max_steps": 10, "learning_rate": "1e-2"}, **({"policy": {"lora": lora}} if lora else {}))
    refshard("precompute", "--config", config)
    before = digests(tmp_path / "shards")
    refshard("train", "--config", config)

    steps = logged_steps(tmp_path / "policy")
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert steps[0][name] == pytest.approx(0, abs=1e-4)
    assert abs(steps[-1]["loss"] - np.log(2)) > 0.01
    assert digests(tmp_path / "shards") == before


def test_adapters_switched_off_give_the_reference_log_prob_for_log_prob(make_run: MakeRun, tmp_path: Path) -> None:
    """L4: after training, the adapter's folder on its base, disabled, is what stage one scored."""
    settings = {"r": 4, "alpha": 8, "dropout": 0.1}
    config_file = make_run(policy={"lora": settings}, train={"max_steps": 5, "learning_rate": "1e-2"})
    refshard("precompute", "--config", config_file)
    refshard("train", "--config", config_file)
    stored = {row["pair_key"]: row for row in stored_rows(tmp_path / "shards" / "train")}

    config = load_config(config_file, ["policy.lora=null", f"policy.adapter={tmp_path / 'policy'}"])
    policy = load_policy(config).eval()
    prepare(policy)
    pairs = kept(config)
    batch = pad_pairs([p.pair for p in pairs], pad_id=0)
    expected = np.array(
        [stored[p.key][f"ref_{side}_logps"] for side in ("chosen", "rejected") for p in pairs], dtype=np.float32
    )
    with torch.no_grad():
        with policy.disable_adapter():
            off = torch.cat(score(policy, batch).sums()).numpy()
        on = torch.cat(score(policy, batch).sums()).numpy()
    np.testing.assert_allclose(off, expected, atol=2e-4)
    assert np.abs(on - expected).max() > 0.1


def test_any_number_of_workers_killed_or_not_gives_the_same_parts(make_run: MakeRun, tmp_path: Path) -> None:
    """L5: 1 worker = 7 workers = 3 workers of which one is killed, then 5."""
    config = make_run(rows=simple_rows(60), precompute={"rows_per_shard": 8})
    stores = {name: tmp_path / name for name in ("one", "seven", "killed")}

    def precompute(name: str, worker: str) -> None:
        refshard("precompute", "--config", config, "-o", f"precompute.output={stores[name]}", "--worker", worker)

    precompute("one", "0/1")
    for index in range(7):
        precompute("seven", f"{index}/7")
    precompute("killed", "0/3")
    _kill_stage_one(config, stores["killed"], "1/3")
    assert not (stores["killed"] / "train" / "index.json").exists()
    for index in (4, 3, 2, 1, 0):
        precompute("killed", f"{index}/5")

    # The store alone: what each worker cost stands beside it.
    expected = digests(stores["one"] / "train")
    assert len(expected) == 8 + 2
    assert digests(stores["seven"] / "train") == expected
    found = {name: value for name, value in digests(stores["killed"] / "train").items() if ".tmp-" not in name}
    assert found == expected


def _kill_stage_one(config: Path, output: Path, worker: str) -> None:
    before = set((output / "train").glob("part-*"))
    process = Watched("precompute", "--config", config, "-o", f"precompute.output={output}", "--worker", worker)
    process.wait_until(lambda: set((output / "train").glob("part-*")) != before)
    process.kill()
    process.wait()


def test_stage_one_leaves_with_75_on_a_signal_and_goes_on_from_there(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run(rows=simple_rows(400), precompute={"rows_per_shard": 8})
    refshard("precompute", "--config", config, "-o", f"precompute.output={tmp_path / 'undisturbed'}")
    process = Watched("precompute", "--config", config)
    process.wait_until(lambda: bool(list((tmp_path / "shards" / "train").glob("part-*"))))
    process.signal(signal.SIGTERM)
    assert process.finish() == 75, process.err
    assert "Run the same command again" in process.err
    assert not list((tmp_path / "shards" / "train").glob(".tmp-*"))
    refshard("precompute", "--config", config)
    assert digests(tmp_path / "shards") == digests(tmp_path / "undisturbed")


def test_after_a_bad_row_the_way_on_that_the_error_names_goes_on_with_what_is_scored(
    make_run: MakeRun, tmp_path: Path
) -> None:
    config = make_run(rows=[*simple_rows(20), {"prompt": "no", "chosen": "pair"}, *simple_rows(3, start=30)])
    done = refshard("precompute", "--config", config, check=65)
    assert f"{tmp_path / 'pairs.jsonl'}:21" in done.stderr
    assert "data.on_bad_row: skip" in done.stderr
    scored = digests(tmp_path / "shards")
    assert len(scored) == 1 + 2
    done = refshard("precompute", "--config", config, "-o", "data.on_bad_row=skip")
    assert "23 pairs kept; 1 dropped: missing column" in done.stdout
    assert scored.items() <= digests(tmp_path / "shards").items()


def test_shuffled_filtered_and_mixed_data_need_no_new_shards(make_run: MakeRun, tmp_path: Path) -> None:
    """L7, first half: the join is by content, so order and company do not matter; beta needs no rescoring."""
    rows = simple_rows(24)
    config = make_run(rows=rows)
    refshard("precompute", "--config", config)
    before = digests(tmp_path / "shards")

    subset = [rows[i] for i in np.random.default_rng(0).permutation(24)[:16]]
    other = write_jsonl(tmp_path / "subset.jsonl", subset)
    done = refshard("train", "--config", config, "-o", f"data.path={other}", "-o", "loss.beta=0.7")
    assert "16 matched, 0 missing, 8 surplus" in done.stdout
    assert logged_steps(tmp_path / "policy")[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert digests(tmp_path / "shards") == before


def test_missing_pairs_are_counted_named_and_refused_unless_dropped(make_run: MakeRun, tmp_path: Path) -> None:
    """L7, second half: a pair that was not scored is an error."""
    config = make_run(rows=simple_rows(24))
    refshard("precompute", "--config", config)
    grown = write_jsonl(tmp_path / "grown.jsonl", [*simple_rows(10), *simple_rows(3, start=100), *simple_rows(5)])

    done = refshard("train", "--config", config, "-o", f"data.path={grown}", check=65)
    assert f"3 of 18 pairs of {grown} (train) have no reference logps" in done.stderr
    assert f"(first: {grown}:11)" in done.stderr
    done = refshard("train", "--config", config, "-o", f"data.path={grown}", "-o", "train.on_missing=drop")
    assert "15 matched, 3 missing" in done.stdout


def test_held_out_sets_have_stores_of_their_own_under_the_same_rules(make_run: MakeRun, tmp_path: Path) -> None:
    for name, start in (("easy", 100), ("hard", 200)):
        write_jsonl(tmp_path / f"{name}.jsonl", simple_rows(8, start=start))
    config = make_run(
        data={"eval": {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("easy", "hard")}},
        train={"eval_strategy": "steps", "eval_steps": 4, "learning_rate": "1e-2"},
    )
    refshard("precompute", "--config", config)
    assert [len(stored_rows(tmp_path / "shards" / name)) for name in ("train", "easy", "hard")] == [24, 8, 8]
    refshard("train", "--config", config)
    metrics = json.loads((tmp_path / "policy" / "run.json").read_text())["metrics"]
    for name in ("easy", "hard"):
        assert metrics[f"eval_{name}_rewards/margins"] != 0
        assert metrics[f"eval_{name}_loss"] > 0

    write_jsonl(tmp_path / "hard.jsonl", simple_rows(9, start=200))
    done = refshard("train", "--config", config, "--overwrite", check=65)
    assert f"1 of 9 pairs of {tmp_path / 'hard.jsonl'}" in done.stderr
    assert f"(first: {tmp_path / 'hard.jsonl'}:9)" in done.stderr


def test_a_changed_reference_or_tokenization_is_refused_by_field(
    make_run: MakeRun, tmp_path: Path, tokenizer: Any
) -> None:
    """L7: what a log-prob depends on can't change without being named; test_stale has every field."""
    config = make_run()
    refshard("precompute", "--config", config)
    other = make_model(tmp_path / "other", tokenizer, seed=1)
    for override, field in (
        ("data.max_length=256", "tokenization.max_length: shards 128, this run 256"),
        (f"policy.model={other}", "reference.weights: shards "),
    ):
        for command in ("train", "precompute"):
            said = refshard(command, "--config", config, "-o", override, check=78).stderr
            assert field in said
            assert len(said.strip().splitlines()) == 1


def test_a_smaller_max_length_is_served_from_the_same_shards(make_run: MakeRun, tmp_path: Path) -> None:
    """Stored token logps of a longer cut hold every shorter one: the sums equal those of a fresh scoring."""
    rows = [{**row, "prompt": row["prompt"] + " Tell me at length, please." * 2} for row in simple_rows(24)]
    config = make_run(rows=rows)
    refshard("precompute", "--config", config)
    refshard("train", "--config", config, "-o", "data.max_length=64")
    fresh = tmp_path / "fresh"
    overrides = ["-o", "data.max_length=64", "-o", f"precompute.output={fresh}"]
    refshard("precompute", "--config", config, *overrides)
    assert any(row["chosen_tokens"] < 20 for row in stored_rows(fresh / "train"))
    refshard("train", "--config", config, *overrides, "-o", f"train.output_dir={tmp_path / 'policy-fresh'}")
    for a, b in zip(logged_steps(tmp_path / "policy"), logged_steps(tmp_path / "policy-fresh"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["logps/chosen"] == pytest.approx(b["logps/chosen"], rel=1e-6)


def test_one_batch_of_eight_equals_eight_micro_batches_and_two_processes(make_run: MakeRun, tmp_path: Path) -> None:
    """L8."""
    config = make_run(rows=simple_rows(64), train={"max_steps": 5, "learning_rate": "1e-2", "optim": "sgd"})
    refshard("precompute", "--config", config)

    def train(name: str, batch: int, accumulation: int, processes: int = 1) -> list[dict[str, float]]:
        overrides = [
            f"train.output_dir={tmp_path / name}",
            f"train.per_device_train_batch_size={batch}",
            f"train.gradient_accumulation_steps={accumulation}",
        ]
        arguments = ["train", "--config", str(config), *(x for o in overrides for x in ("-o", o))]
        if processes == 1:
            refshard(*arguments)
        else:
            ranks = start_ranks(processes, *arguments)
            assert [rank.finish() for rank in ranks] == [0] * processes, [rank.err for rank in ranks]
        return logged_steps(tmp_path / name)

    whole = train("whole", 8, 1)
    assert abs(whole[-1]["loss"] - np.log(2)) > 1e-3
    for other in (train("micro", 1, 8), train("processes", 4, 1, processes=2)):
        for number, (a, b) in enumerate(zip(whole, other, strict=True)):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
            assert a.keys() == b.keys() >= {"kl/chosen", "ref/margins", "logps/chosen_shift", "lengths/truncated"}
            # At the first step every margin is 0 but for rounding, and which side of 0 it is on is chance.
            for name in a.keys() - {"grad_norm", *(["rewards/accuracies"] if number == 0 else [])}:
                # Rewards are differences of logps a thousand times as large.
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    ("lora", "how"),
    [(None, signal.SIGKILL), ({"r": 4, "alpha": 8, "dropout": 0.2}, signal.SIGTERM)],
    ids=["full, killed", "lora, terminated"],
)
def test_ten_steps_equal_five_stopped_resumed_and_five_more_bit_for_bit(
    make_run: MakeRun, tmp_path: Path, lora: dict[str, Any] | None, how: signal.Signals
) -> None:
    """L9, with AdamW and adapter dropout, so that optimizer, schedule and random state all must come back."""
    config = make_run(
        rows=simple_rows(40),
        train={
            "max_steps": 10,
            "save_strategy": "steps",
            "save_steps": 5,
            "gradient_accumulation_steps": 16,
            "learning_rate": "1e-3",
        },
        **({"policy": {"lora": lora}} if lora else {}),
    )
    refshard("precompute", "--config", config)
    refshard("train", "--config", config, "-o", f"train.output_dir={tmp_path / 'undisturbed'}")

    process = Watched("train", "--config", config)
    process.wait_until((tmp_path / "policy" / "checkpoint-5" / "refshard-commit.json").exists)
    process.signal(how)
    assert process.finish() == (75 if how == signal.SIGTERM else -how), process.err
    settings = (tmp_path / "policy" / "refshard.yaml").read_bytes()
    refused = refshard("train", "--config", config, "-o", "loss.beta=0.5", check=78)
    assert "loss.beta: saved" in refused.stderr
    assert (tmp_path / "policy" / "refshard.yaml").read_bytes() == settings
    done = refshard("train", "--config", config)
    assert "Resuming" in done.stdout

    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "policy" / weights).read_bytes() == (tmp_path / "undisturbed" / weights).read_bytes()
    assert logged_steps(tmp_path / "policy") == logged_steps(tmp_path / "undisturbed")
    again = refshard("train", "--config", config)
    assert "finished already" in again.stdout
    refused = refshard("train", "--config", config, "-o", "loss.beta=0.5", check=78)
    assert "loss.beta: saved" in refused.stderr


def test_a_temporary_file_is_never_read(make_run: MakeRun, tmp_path: Path) -> None:
    """L11."""
    config = make_run()
    store = tmp_path / "shards" / "train"
    store.mkdir(parents=True)
    (store / ".tmp-0123").write_bytes(b"half a part")
    refshard("precompute", "--config", config)
    refshard("inspect", tmp_path / "shards")
    refshard("train", "--config", config)
    assert (store / ".tmp-0123").read_bytes() == b"half a part"


def test_a_run_killed_after_its_last_checkpoint_takes_no_further_step(make_run: MakeRun, tmp_path: Path) -> None:
    """The library would take one: it looks at the number of steps only after the next."""
    config = make_run(train={"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": "1e-2"})
    refshard("precompute", "--config", config)
    refshard("train", "--config", config)
    output = tmp_path / "policy"
    weights, before = (output / "model.safetensors").read_bytes(), logged_steps(output)
    for name in ("run.json", "model.safetensors", "trainer_state.json"):
        (output / name).unlink()
    refshard("train", "--config", config)
    assert (output / "model.safetensors").read_bytes() == weights
    assert logged_steps(output) == before
