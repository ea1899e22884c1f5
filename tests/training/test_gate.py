"""The parity gate: planted faults are each caught before step one, with the cause named; healthy runs pass."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

from pipeline.base.errors import ConfigError
from pipeline.config.reader import load_config
from pipeline.models import loading
from pipeline.models.identity import PolicyReferenceRelation
from pipeline.models.precision import Precision
from pipeline.scoring import scorer
from pipeline.scoring.agreement import NoiseFloor, allowed_gap
from pipeline.scoring.attention import switch_attention
from pipeline.scoring.forward import score
from pipeline.store.finishing import finish_store
from pipeline.store.store import Store, open_store, read_parts
from pipeline.training.gate import Gaps, Gate, choose_sample
from stages import train
from stages.precompute import command as precompute
from support.models import make_model, make_tokenizer
from support.runs import refshard, simple_rows, write_jsonl
from support.stores import forge_part

pytestmark = pytest.mark.slow

MakeRun = Callable[..., Path]

PASSED = "Parity gate: the policy before its first step is the reference"
TEMPLATE = "{% for m in messages %}START{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}START{% endif %}"


def steps(output: Path) -> list[dict[str, float]]:
    entries = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in entries if "loss" in entry]


def refused(config: Path, status: int, *arguments: str) -> str:
    """The one line with which stage two stops, before it took a step."""
    done = refshard("train", "--config", config, *arguments, check=status)
    lines = [line for line in done.stderr.splitlines() if line.startswith("refshard:")]
    assert len(lines) == 1
    assert "train: 1 of" not in done.stderr
    return lines[0]


def token_columns(store: Path) -> list[dict[str, Any]]:
    """Each row's token logps, as columns that can be imported."""
    rows = [row for part in read_parts(open_store(store)) for row in part.to_pylist()]
    return [{"c": row["chosen_token_logps"], "r": row["rejected_token_logps"]} for row in rows]


def import_scores(config: Path, folder: Path, rows: list[dict[str, Any]], scores: list[dict[str, Any]]) -> None:
    """Declare scores to be those of the config's reference, whatever they are."""
    file = write_jsonl(folder / "scores.jsonl", [{**row, **score} for row, score in zip(rows, scores, strict=True)])
    refshard("import", file, "--config", config, "--chosen", "c", "--rejected", "r", "--overwrite")


def shift(part: Path, by: float, *, sums_only: bool = False) -> None:
    """Shift the stored values of one part, every digest made to fit."""
    table = pq.read_table(part)
    for side in ("chosen", "rejected"):
        lists = table[f"{side}_token_logps"].to_pylist()
        moved = [[value + by for value in values] for values in lists]
        sums = [np.float32(np.sum(np.array(values, dtype=np.float64))) for values in moved]
        columns = {f"ref_{side}_logps": pa.array(sums, pa.float32())}
        if not sums_only:
            columns[f"{side}_token_logps"] = pa.array(moved, table.schema.field(f"{side}_token_logps").type)
        for name, column in columns.items():
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(name), column)
    forge_part(part, table)


def index_again(store: Path) -> None:
    """Write the index of three changed parts, without the canary of stage one, which would refuse them."""
    (store / "index.json").unlink()
    assert finish_store(store, 3) == []


# Faults in the shards.


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_one_shard_shifted_by_a_constant_is_named(make_run: MakeRun, tmp_path: Path, lora: Any) -> None:
    config = make_run(**({"policy": {"lora": lora}} if lora else {}))
    refshard("precompute", "--config", config)
    store = tmp_path / "shards" / "train"
    shift(store / "part-00001.parquet", 0.02)
    index_again(store)
    message = refused(config, 65)
    assert "only in part-00001.parquet" in message
    assert "Delete it" in message


def test_every_shard_shifted_by_a_constant_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run()
    refshard("precompute", "--config", config)
    store = tmp_path / "shards" / "train"
    for part in store.glob("part-*"):
        shift(part, -0.02)
    index_again(store)
    assert "Every token is off by the same -0.02" in refused(config, 65)


def test_sums_that_were_shifted_without_their_tokens_are_refused_by_the_join(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run()
    refshard("precompute", "--config", config)
    store = tmp_path / "shards" / "train"
    shift(store / "part-00002.parquet", 0.01, sums_only=True)
    index_again(store)
    assert "part 2: its sums are not those of its token logps" in refused(config, 65)


# Faults in who the reference is: the identity names them by field; under a forged identity the gate sees them.


def test_scores_of_another_checkpoint_under_this_ones_name_are_caught(
    make_run: MakeRun, tmp_path: Path, tokenizer: Any
) -> None:
    config = make_run()
    other = make_model(tmp_path / "other", tokenizer, seed=5)
    output = tmp_path / "other-shards"
    refshard("precompute", "--config", config, "-o", f"policy.model={other}", "-o", f"precompute.output={output}")
    import_scores(config, tmp_path, simple_rows(24), token_columns(output / "train"))
    message = refused(config, 78)
    assert "the policy was loaded from another checkpoint" in message
    # The same fault with an adapter on the policy: it is not the adapter's doing, and not said to be.
    message = refused(config, 78, "-o", "policy.lora.r=2")
    assert "another checkpoint" in message and "adapter, declared fresh" not in message


def test_another_chat_template_with_as_many_ids_is_caught(make_run: MakeRun, tmp_path: Path) -> None:
    """By the identity, field by field; and where scores are declared to be of this template, by the gate."""
    one, two = (make_tokenizer(template=TEMPLATE.replace("START", mark)) for mark in ("<|im_start|>", "[INST]"))
    first, second = (make_model(tmp_path / name, t, seed=0) for name, t in (("one", one), ("two", two)))
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in simple_rows(24)
    ]
    config = make_run(rows=rows, policy={"model": str(first)})
    refshard("precompute", "--config", config)
    changed = ["-o", f"policy.model={second}"]
    assert "tokenization.chat_template: shards" in refused(config, 78, *changed)

    lengths = [len(one.apply_chat_template(row["prompt"] + row["chosen"])["input_ids"]) for row in rows]
    assert lengths == [len(two.apply_chat_template(row["prompt"] + row["chosen"])["input_ids"]) for row in rows]
    scores = token_columns(tmp_path / "shards" / "train")
    config = make_run(rows=rows, policy={"model": str(second)}, precompute={"output": str(tmp_path / "forged")})
    import_scores(config, tmp_path, rows, scores)
    assert "a chat template that is not this run's" in refused(config, 78)


def test_an_eos_that_was_scored_otherwise_is_seen_at_the_completions_end(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run()
    refshard("precompute", "--config", config)
    scores = token_columns(tmp_path / "shards" / "train")
    for row in scores:
        row["c"][-1] -= 2.0
        row["r"][-1] -= 2.0
    import_scores(config, tmp_path, simple_rows(24), scores)
    message = refused(config, 78)
    assert "first or last token" in message and "EOS rule" in message


# Faults in how the policy computes.


@pytest.mark.parametrize(
    ("override", "differs", "precision"),
    [
        ("train.bf16=true", "reference.autocast: shards none, this run bfloat16", "float32 under bfloat16 autocast"),
        ("policy.dtype=bfloat16", "reference.dtype: shards float32, this run bfloat16", "bfloat16"),
    ],
)
def test_another_precision_than_the_references_is_caught(
    make_run: MakeRun, override: str, differs: str, precision: str
) -> None:
    config = make_run()
    refshard("precompute", "--config", config)
    message = refused(config, 78, "-o", override)
    assert differs in message
    # The gate would refuse a reference of more digits, too.
    assert "To use these as they are" not in message
    message = refused(config, 78, "-o", override, "-o", "reference.dtype=float32")
    assert f"was scored in float32, the policy computes in {precision}: on 24 pairs, rewards/margins begin" in message
    assert "leave reference.dtype and reference.autocast out" in message


def test_dropout_left_on_is_caught(
    make_run: MakeRun, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers.set_seed(0)
    settings = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.1)
    transformers.GPT2LMHeadModel(settings).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    config = make_run(policy={"model": str(tmp_path / "gpt2")})
    refshard("precompute", "--config", config)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "disable_dropout", lambda model: None)
        with pytest.raises(ConfigError, match="In evaluation mode it is, so dropout"):
            train.run(load_config(config))
    assert PASSED in refshard("train", "--config", config).stdout


def test_an_adapter_with_a_change_declared_fresh_is_caught(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(policy={"lora": {"r": 4}})
    refshard("precompute", "--config", config)
    fresh = loading._adapter_config

    def not_zero(policy: Any) -> Any:
        made = fresh(policy)
        made.init_lora_weights = False
        return made

    with monkeypatch.context() as patch:
        patch.setattr(loading, "_adapter_config", not_zero)
        with pytest.raises(ConfigError, match="With the adapter switched off it is, so the adapter, declared fresh"):
            train.run(load_config(config))
    assert PASSED in refshard("train", "--config", config).stdout


def test_on_mismatch_warn_says_it_and_trains(make_run: MakeRun, tmp_path: Path) -> None:
    config = make_run()
    refshard("precompute", "--config", config)
    words = ("train.bf16=true", "reference.dtype=float32", "train.on_mismatch=warn")
    done = refshard("train", "--config", config, *(part for word in words for part in ("-o", word)))
    assert "warning: the policy before its first step is not the reference" in done.stdout
    assert len(steps(tmp_path / "policy")) == 4


# Healthy runs.


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["policy.dtype=bfloat16", "reference.dtype=bfloat16"],
        ["train.bf16=true", "reference.dtype=bfloat16"],
        ["reference.dtype=bfloat16"],
    ],
    ids=["float32", "bf16 weights", "bf16 autocast", "bf16 reference, float32 policy"],
)
@pytest.mark.parametrize("family", ["dense", "experts"])
def test_healthy_runs_pass(
    make_run: MakeRun, tmp_path: Path, tokenizer: Any, family: str, overrides: list[str]
) -> None:
    model = make_model(tmp_path / "dense", tokenizer)
    if family == "experts":
        transformers.set_seed(0)
        settings = transformers.MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            initializer_range=0.2,
        )
        model = tmp_path / "experts"
        transformers.MixtralForCausalLM(settings).save_pretrained(model)
        tokenizer.save_pretrained(model)
    config = make_run(policy={"model": str(model)})
    words = [word for override in overrides for word in ("-o", override)]
    refshard("precompute", "--config", config, *words)
    done = refshard("train", "--config", config, *words)
    assert PASSED in done.stdout
    assert "24 pairs of 3 shards" in done.stdout
    noise = open_store(tmp_path / "shards" / "train").noise
    assert noise.tokens > 0


def test_after_a_resume_the_base_under_the_adapter_is_compared(make_run: MakeRun, tmp_path: Path) -> None:
    """A fresh adapter switched off, and a continued one put back, are the reference at any step."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": "1e-2"}
    config = make_run(policy={"lora": {"r": 4, "dropout": 0.1}}, train=saving)
    refshard("precompute", "--config", config)
    refshard("train", "--config", config)
    (tmp_path / "policy" / "run.json").unlink()
    stop_short(tmp_path / "policy")
    done = refshard("train", "--config", config)
    assert "Parity gate: the policy with its adapter switched off is the reference" in done.stdout

    overrides = {
        "policy.lora": "null",
        "policy.adapter": tmp_path / "policy",
        "train.output_dir": tmp_path / "second",
        "precompute.output": tmp_path / "second-shards",
    }
    words = [word for key, value in overrides.items() for word in ("-o", f"{key}={value}")]
    refshard("precompute", "--config", config, *words)
    assert PASSED in refshard("train", "--config", config, *words).stdout
    undisturbed = (tmp_path / "second" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "second" / "run.json").unlink()
    stop_short(tmp_path / "second")
    done = refshard("train", "--config", config, *words)
    assert f"Parity gate: the policy with the adapter {tmp_path / 'policy'} is the reference" in done.stdout
    assert (tmp_path / "second" / "adapter_model.safetensors").read_bytes() == undisturbed


def stop_short(output: Path) -> None:
    """As if the run had been killed after its first checkpoint."""
    for file in sorted((output / "checkpoint-4").iterdir()):
        file.unlink()
    (output / "checkpoint-4").rmdir()


def test_an_explicit_reference_is_compared_with_nothing_unless_it_is_the_policy_itself(
    make_run: MakeRun, tmp_path: Path, tokenizer: Any
) -> None:
    other, same = (make_model(tmp_path / name, tokenizer, seed=seed) for name, seed in (("other", 3), ("same", 0)))
    for model, compared in ((other, False), (same, True)):
        config = make_run(
            reference={"model": str(model)},
            precompute={"output": str(tmp_path / f"shards-{compared}")},
            train={"output_dir": str(tmp_path / f"policy-{compared}")},
        )
        refshard("precompute", "--config", config)
        assert (PASSED in refshard("train", "--config", config).stdout) == compared


# The noise floor.


def test_stage_one_measures_how_far_a_pairs_company_moves_it(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scorer whose numbers depend on the batch's size shows by how much; one whose do not shows rounding."""
    config = make_run(precompute={"rows_per_shard": 24, "tokens_per_batch": 100_000})
    refshard("precompute", "--config", config)
    plain = open_store(tmp_path / "shards" / "train").noise
    assert 0 < plain.tokens < 100
    assert plain.mean <= plain.largest < 1e-4

    def leaning(model: Any, batch: Any, **options: Any) -> Any:
        scores = score(model, batch, **options)
        moved = dataclasses.replace(scores.tokens, logps=scores.tokens.logps - 0.01 * batch.num_pairs)
        return dataclasses.replace(scores, tokens=moved)

    monkeypatch.setattr(scorer, "score", leaning)
    # The whole check would see that something is wrong.
    monkeypatch.setattr(scorer, "check_scoring", lambda model, *rest: "packed" if switch_attention(model) else "padded")
    output = tmp_path / "leaning"
    precompute.run(load_config(config, [f"precompute.output={output}", "reference.dtype=float32"]))
    store = open_store(output / "train")
    assert store.noise.tokens == plain.tokens
    # All 24 pairs in one batch, then one of them alone.
    assert store.noise.mean == pytest.approx(0.23, abs=1e-3)
    assert store.noise.largest == pytest.approx(0.23, abs=1e-3)
    shown = refshard("inspect", output).stdout
    assert f"0.23 nats per token, 0.23 at most ({plain.tokens} tokens scored twice)" in shown


# The parts.


def make_gate(noise: NoiseFloor, dtype: str = "float32") -> Gate:
    store = Store(folder=Path("shards"), manifest={}, index={"noise": vars(noise)})
    nothing = PolicyReferenceRelation(at_start=True, adapters_off=False, frozen_adapter=None)
    return Gate(
        store=store,
        allowed=allowed_gap(noise, dtype),
        reference=Precision(weights=dtype),
        policy=Precision(weights=dtype),
        beta=0.1,
        relation=nothing,
        start=0,
        warn_only=False,
    )


def gaps(*values: float) -> Gaps:
    array: npt.NDArray[np.float64] = np.array(values)
    return Gaps([array], [0], [])


@pytest.mark.parametrize(
    ("noise", "dtype", "found", "passes"),
    [
        (NoiseFloor(), "float32", gaps(1e-6, -2e-5), True),
        (NoiseFloor(), "float32", gaps(1e-3, -1e-3), False),
        (NoiseFloor(tokens=9, mean=1e-3, largest=0.2), "float32", gaps(1e-3, -1e-3), True),
        # Experts that change at a tie move single tokens by nats.
        (NoiseFloor(tokens=9, mean=0.2, largest=3.0), "bfloat16", gaps(0.1, -7.0, *([0.1] * 20)), True),
        (NoiseFloor(), "bfloat16", gaps(0.1, -7.0, *([0.1] * 20)), False),
        (NoiseFloor(), "float32", gaps(float("nan"), 0.0), False),
    ],
)
def test_what_passes_is_judged_by_the_noise_floor(noise: NoiseFloor, dtype: str, found: Gaps, passes: bool) -> None:
    assert make_gate(noise, dtype).judge(found).agrees == passes


def test_the_sample_has_every_part_and_every_length_and_no_unscored_row() -> None:
    random = np.random.default_rng(0)
    count, parts = 2000, 60
    lengths = random.integers(1, 300, count)
    logps = random.normal(-50, 5, count).astype(np.float32)
    logps[::7] = np.nan
    dataset = datasets.Dataset.from_dict(
        {
            "prompt_ids": [[0] * int(n) for n in lengths],
            "chosen_ids": [[1]] * count,
            "part": np.sort(random.integers(0, parts, count)).astype(np.int32),
            "ref_chosen_logps": logps,
        }
    )
    rows = choose_sample(dataset)
    assert rows == choose_sample(dataset) == sorted(set(rows))
    assert np.isfinite(logps[rows]).all()
    assert set(np.array(dataset["part"])[rows]) == set(range(parts))
    scored = np.flatnonzero(np.isfinite(logps))
    assert lengths[rows].min() == lengths[scored].min() and lengths[rows].max() == lengths[scored].max()
    assert len(rows) <= 32 + parts
