"""Lengths up to which a model scores a sequence as it is alone, and how longer ones are refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.models.identity import differences
from pipeline.models.lengths import exact_length, positions_of
from support.models import GROUPED, SMALL, make_tokenizer
from support.runs import refshard

MakeRun = Callable[..., Path]

TOKENIZER = make_tokenizer(bos=True)
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config_class", "settings", "length"),
    [
        ("LlamaConfig", {}, None),
        ("LlamaConfig", {"rope_parameters": {**DYNAMIC, "rope_type": "linear"}}, None),
        ("LlamaConfig", {"rope_parameters": DYNAMIC}, 128),
        # As checkpoints of years ago name it.
        ("LlamaConfig", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 128),
        ("LlamaConfig", {"rope_parameters": LONGROPE}, 32),
        ("Phi3Config", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}, 64),
        ("Gemma3TextConfig", {"rope_parameters": {"full_attention": LONGROPE, "sliding_attention": PLAIN}}, 32),
        ("DogeConfig", {"keep_window_size": 16}, 16),
    ],
)
def test_the_exact_length_is_that_of_what_the_longest_row_decides(
    config_class: str, settings: dict[str, Any], length: int | None
) -> None:
    config = getattr(transformers, config_class)(**GROUPED, **copy.deepcopy(settings))
    assert exact_length(config.get_text_config()) == length


WIDE = {**SMALL, "max_position_embeddings": 40}
GPT = {"vocab_size": 97, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4}
TABLES: dict[str, tuple[dict[str, Any], int | None]] = {
    "GPT2": (GPT, 40),
    "GPTBigCode": (GPT, 40),
    "GPTJ": ({**GPT, "rotary_dim": 4}, 40),
    "CodeGen": ({**GPT, "rotary_dim": 4}, 40),
    "OPT": ({**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32}, 40),
    "BioGpt": (WIDE, 40),
    "Mpt": ({"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 40}, 40),
    "Bloom": ({"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}, None),
    "XGLM": ({**WIDE, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}, None),
    "GPTNeoX": (WIDE, None),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_model_runs_as_many_positions_as_are_found_and_no_more(name: str) -> None:
    settings, positions = TABLES[name]
    config = getattr(transformers, f"{name}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.device("meta"):
        assert positions_of(transformers.AutoModelForCausalLM.from_config(config)) == positions_of(model) == positions
    with torch.no_grad():
        model(input_ids=torch.ones((1, positions or 90), dtype=torch.long))
        if positions is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.ones((1, positions + 1), dtype=torch.long))


def make_model(folder: Path, config_class: str, **settings: Any) -> Path:
    ids = {f"{name}_token_id": getattr(TOKENIZER, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = getattr(transformers, config_class)(**copy.deepcopy({**settings, **ids, "vocab_size": len(TOKENIZER)}))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_length_that_changes_its_neighbours_is_refused_by_each_command(make_run: MakeRun, tmp_path: Path) -> None:
    model = make_model(tmp_path / "longrope", "LlamaConfig", **{**GROUPED, "rope_parameters": LONGROPE})
    said = "data.max_length: must be at most 32 for policy.model: one longer sequence changes how llama scores all"
    for length in (128, None):
        config = make_run(policy={"model": str(model)}, data={"max_length": length})
        for command in ("check", "precompute") if length else ("precompute",):
            assert said in refshard(command, "--config", config, check=2).stderr
    assert not (tmp_path / "shards").exists()
    config = make_run(policy={"model": str(model)}, data={"max_length": 32})
    refshard("precompute", "--config", config)
    assert said in refshard("train", "--config", config, "-o", "data.max_length=128", check=2).stderr
    refshard("train", "--config", config)


@pytest.mark.slow
def test_a_pair_without_positions_is_refused_by_each_command(make_run: MakeRun, tmp_path: Path) -> None:
    gpt = make_model(tmp_path / "gpt", "GPT2Config", **{**GPT, "n_positions": 64})
    llama = make_model(tmp_path / "llama", "LlamaConfig", **GROUPED)
    models = {"policy": {"model": str(gpt)}, "reference": {"model": str(llama)}}
    said = "data.max_length: must be at most 64, the positions of policy.model, for "
    # The reference alone has positions enough.
    refshard("precompute", "--config", make_run(**models), "-o", "train={}")
    config = make_run(**models)
    for command in ("check", "train"):
        assert said in refshard(command, "--config", config, check=2).stderr
    refused = refshard("precompute", "--config", make_run(policy={"model": str(gpt)}), "--overwrite", check=2).stderr
    assert said in refused and "tokens, got 128. Set data.max_length: 64" in refused
    # A longer limit is no harm if all pairs are short.
    config = make_run(rows=[{"prompt": "Hi", "chosen": " a", "rejected": " b"}] * 8, policy={"model": str(gpt)})
    refshard("precompute", "--config", config, "--overwrite")
    refshard("train", "--config", config)


def test_a_store_whose_pairs_were_longer_than_exact_serves_no_shorter_run(make_run: MakeRun) -> None:
    identities = [{"tokenization": {"max_length": length, "token_logps": True}} for length in (None, 1024, 128, 64)]
    run = identities[-1]
    told = [differences(stored, run, joining=True, exact=128) for stored in identities]
    assert [len(found) for found in told] == [1, 1, 0, 0]
    assert "with pairs of more than 128 tokens" in told[1][0]
    assert not differences(identities[0], run, joining=True)
