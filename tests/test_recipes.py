"""The ready recipes: each loads, and the one for HH-RLHF runs on real pairs of that set."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from conftest import HH, make_model, make_tokenizer, refshard

from pipeline.config import load_config, training_settings

RECIPES = Path(__file__).parents[1] / "stages" / "recipes"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_loads_and_says_what_it_is_for(file: Path) -> None:
    config = load_config(file)
    settings = training_settings(config)
    assert settings["output_dir"]
    assert config.data.eval
    assert file.read_text().startswith("# ")


@pytest.mark.slow
@pytest.mark.skipif(not HH.exists(), reason=f"the HH-RLHF pairs are not at {HH}")
def test_the_hh_recipe_runs_both_stages_on_real_transcripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "model", make_tokenizer(bos=True))
    overrides = {
        "data.path": HH,
        "data.split": "train[:1300]",
        "data.eval": "{test: {split: 'train[1300:]'}}",
        "data.max_length": 512,
        "policy.model": tmp_path / "model",
        "reference.dtype": "float32",
        "precompute.output": tmp_path / "shards",
        "precompute.rows_per_shard": 256,
        "train.output_dir": tmp_path / "policy",
        "train.bf16": "false",
        "train.max_steps": 4,
        "train.gradient_accumulation_steps": 1,
        "train.eval_strategy": "no",
        "train.logging_steps": 1,
        "train.warmup_steps": 0,
        "train.use_cpu": "true",
    }
    arguments = ["--config", RECIPES / "hh_rlhf.yaml", *(x for k, v in overrides.items() for x in ("-o", f"{k}={v}"))]
    scored = refshard("precompute", *arguments)
    trained = refshard("train", *arguments)

    assert all(word in scored.stderr for word in ("pairs/s", "tokens/s", "s left"))
    totals = {}
    for name, rows in (("train", 1300), ("test", 200)):
        totals[name] = json.loads((tmp_path / "shards" / name / "index.json").read_text())["totals"]
        assert totals[name]["rows"] == rows
        assert totals[name]["kept"] + sum(totals[name]["dropped"].values()) == rows
        assert totals[name]["kept"] > 0.75 * rows
        assert f"{name}: {rows:,} rows, {totals[name]['kept']:,} pairs kept" in scored.stdout
        assert f"{totals[name]['kept']:,} matched, 0 missing" in trained.stdout
    # This part of the set has answers that are empty; they are skipped one by one, with their lines.
    skipped = [json.loads(line) for line in (tmp_path / "shards" / "train" / "skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == totals["train"]["dropped"]["empty_completion"] > 0
    assert all(entry["place"].startswith(f"{HH}:") for entry in skipped)
    metrics = json.loads((tmp_path / "policy" / "run.json").read_text())["metrics"]
    assert 0 <= metrics["eval_rewards/accuracies"] <= 1
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with capsys.disabled():
        print(f"\n{scored.stdout}")


@pytest.mark.slow
def test_a_lora_run_ends_in_a_folder_that_peft_loads_and_a_card_that_states_it(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    import peft

    config = make_run(policy={"lora": {"r": 4, "alpha": 8}})
    refshard("precompute", "--config", config)
    refshard("train", "--config", config)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "policy")
    ids = tokenizer("What is 2 plus 3?", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 3
    card = (tmp_path / "policy" / "README.md").read_text()
    fingerprint = json.loads((tmp_path / "shards" / "train" / "manifest.json").read_text())["fingerprint"]
    for part in (fingerprint, "beta 0.1", "pairs.jsonl", "LoRA, rank 4", str(tmp_path / "pairs.jsonl"), "24 pairs"):
        assert part in card
    saved = load_config(tmp_path / "policy" / "refshard.yaml")
    assert saved.policy.lora is not None
    assert saved.policy.lora.r == 4
