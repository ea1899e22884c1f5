"""Tiny models, tokenizers and settings that the tests share; everything is made here, nothing is fetched."""

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, and threads that wait for each other on a busy machine lose minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from processes import Command
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pipeline.store.format import content_digest

torch.set_num_threads(1)

HH = Path(__file__).parents[2] / "shared" / "data" / "hh-rlhf-harmless.jsonl.gz"

CORPUS = [
    "Human: how do I bake bread? Assistant: mix flour, water, salt and yeast; wait; bake it hot.",
    "The quick brown fox jumps over the lazy dog. What is two plus two? Four! Or, if you insist, 5.",
    "I'm sorry, but I can't help with that. Sure, here is what you asked for: one, two, three.",
    "Review the film called The Silent River. The acting felt dull. I would happily recommend it.",
]


def make_tokenizer(*, bos: bool = False, auto_eos: bool = False, template: str | None = None) -> Any:
    """A byte-level BPE tokenizer of 400 tokens; merges across spaces and punctuation as trained."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos or auto_eos:
        single = f"{'<s> ' if bos else ''}$A{' </s>' if auto_eos else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = template
    return fast


def make_model(folder: Path, tokenizer: Any, *, seed: int = 0, **changes: Any) -> Path:
    """Save a random Llama of about 0.1 million parameters, sharp enough that its log-probs differ by nats."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }
    transformers.set_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put modules with slow tests first, so that at the end of a run on two workers neither waits for the other long.

    A module stays whole and in its own order, for its fixtures.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer(bos=True)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), tokenizer)


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def simple_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Explicit-prompt pairs, all different, of varying length."""
    return [
        {
            "prompt": f"What is {i} plus {i + 1}?" + " Please answer." * (i % 4),
            "chosen": f" It is {2 * i + 1}." + " I am sure." * (i % 3),
            "rejected": f" Nobody knows {i}" + " or cares" * (i % 5) + ".",
        }
        for i in range(start, start + count)
    ]


def write_config(file: Path, **sections: Any) -> Path:
    file.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return file


@pytest.fixture
def make_run(tmp_path: Path, model_folder: Path) -> Callable[..., Path]:
    """Write a config of both stages on `rows`; keyword arguments are merged into its sections."""

    def make(rows: list[Any] | None = None, **changes: Mapping[str, Any]) -> Path:
        data = write_jsonl(tmp_path / "pairs.jsonl", simple_rows(24) if rows is None else rows)
        sections: dict[str, Any] = {
            "data": {"path": str(data), "max_length": 128},
            "policy": {"model": str(model_folder)},
            "precompute": {"output": str(tmp_path / "shards"), "rows_per_shard": 8, "tokens_per_batch": 512},
            "loss": {"beta": 0.1},
            "train": {
                "output_dir": str(tmp_path / "policy"),
                "per_device_train_batch_size": 4,
                "max_steps": 4,
                "learning_rate": "1e-3",
                "logging_steps": 1,
                "save_strategy": "no",
                "disable_tqdm": True,
                "use_cpu": True,
            },
        }
        for name, values in changes.items():
            sections.setdefault(name, {}).update(values)
        return write_config(tmp_path / "run.yaml", **sections)

    return make


def bytes_of_stores(output: Path) -> dict[str, bytes]:
    """All files of an output folder by their path in it, but for what its workers have cost, which is never alike."""
    files = (file for file in sorted(output.rglob("*")) if file.is_file())
    return {
        name: file.read_bytes()
        for name, file in ((file.relative_to(output).as_posix(), file) for file in files)
        if not name.startswith("costs/")
    }


def forge_part(file: Path, table: pa.Table) -> None:
    """Write a part with other content as one who means it: with the digest of what it says now."""
    said = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    digest = {b"refshard.digest": content_digest(table, said).encode()}
    whole = table.replace_schema_metadata({**table.schema.metadata, **digest})
    file.unlink()
    pq.write_table(whole, file, write_page_checksum=True, store_schema=True)


def refshard(*arguments: Any, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own; `check` is the exit status to expect."""
    command = Command(*arguments)
    status = command.wait()
    assert status is not None, f"{command.words} still runs after 600 s"
    out, err = command.said()
    if check is not None:
        assert status == check, f"exit {status}, expected {check}\n{out}\n{err}"
    return subprocess.CompletedProcess(command.words, status, out, err)
