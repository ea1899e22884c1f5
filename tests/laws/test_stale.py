"""Shards and what came after them: each change is refused by its field, named by its row, or served unchanged.

Scored once; then the checks of either stage run on changed settings, models and data, up to where a model would load.
"""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from pipeline.base.errors import DataError, RefshardError
from pipeline.base.signals import StopFlag
from pipeline.config.reader import load_config
from pipeline.models.files import load_tokenizer
from pipeline.training.joining import check_joined, join_sets, open_joined, open_stores_of_run
from stages.precompute import command as precompute
from support.models import make_model, make_tokenizer
from support.runs import refshard, simple_rows, write_config, write_jsonl
from support.tally import tally

pytestmark = pytest.mark.slow

ROWS = simple_rows(24)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Scored:
    """A folder with data, a model, settings and finished shards; a test changes its own copy."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "pairs.jsonl"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def stage_one(self, *overrides: str) -> None:
        precompute.run(load_config(self.folder / "run.yaml", self._here(overrides)))

    def stage_two(self, *overrides: str) -> pa.Table:
        """The joined set, as training would read it."""
        config = load_config(self.folder / "run.yaml", self._here(overrides))
        tokenizer = load_tokenizer(config)
        stores = open_stores_of_run(config, ["train"], tokenizer)
        joined = self.folder / "policy" / "joined"
        join_sets(config, stores, tokenizer, joined, StopFlag())
        return open_joined(joined, "train").data.table

    def _here(self, overrides: tuple[str, ...]) -> list[str]:
        places = {"data.path": self.data, "policy.model": self.model, "precompute.output": self.folder / "shards"}
        return [*(f"{key}={value}" for key, value in places.items()), *overrides]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    write_jsonl(folder / "pairs.jsonl", ROWS)
    make_model(folder / "model", make_tokenizer(bos=True, template=TEMPLATE))
    config = write_config(
        folder / "run.yaml",
        data={"path": str(folder / "pairs.jsonl"), "max_length": 128},
        policy={"model": str(folder / "model")},
        precompute={"output": str(folder / "shards"), "rows_per_shard": 8, "tokens_per_batch": 512},
    )
    refshard("precompute", "--config", config)
    return folder


@pytest.fixture
def scored(original: Path, tmp_path: Path) -> Iterator[Scored]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield Scored(shutil.copytree(original, tmp_path / "run"))
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["train.arrow", "token-logps.f32"])
def test_a_joined_set_that_is_damaged_before_it_is_opened_is_named(scored: Scored, name: str) -> None:
    scored.stage_two("loss.ld_alpha=0.5")
    joined = scored.folder / "policy" / "joined"
    content = bytearray((joined / name).read_bytes())
    content[len(content) // 2] ^= 0x40
    (joined / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{joined / name}: must hold what was joined"):
        check_joined(joined)


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def other_tokenizer(scored: Scored) -> None:
    tokenizer = make_tokenizer(bos=True, template=TEMPLATE)
    tokenizer.add_tokens(["fresh"])
    tokenizer.save_pretrained(scored.model)


def other_template(scored: Scored) -> None:
    make_tokenizer(bos=True, template=TEMPLATE + " ").save_pretrained(scored.model)


def other_eos(scored: Scored) -> None:
    tokenizer = make_tokenizer(bos=True, template=TEMPLATE)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(scored.model)


def other_weights(scored: Scored) -> None:
    make_model(scored.folder / "other", make_tokenizer(bos=True), seed=1)
    shutil.copy(scored.folder / "other" / "model.safetensors", scored.model)


def one_flipped_weight(scored: Scored) -> None:
    content = bytearray((scored.model / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (scored.model / "model.safetensors").write_bytes(content)


def new_adapter(scored: Scored) -> None:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(scored.model), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(scored.folder / "adapter")


def nothing(scored: Scored) -> None:
    pass


REFUSED: dict[str, tuple[Callable[[Scored], None], tuple[str, ...], str]] = {
    "tokenizer": (other_tokenizer, (), "tokenization.tokenizer: shards "),
    "chat template": (other_template, (), "tokenization.chat_template: shards "),
    "end of text": (other_eos, (), "tokenization.eos: shards </s>, this run <|im_end|>"),
    "weights": (other_weights, (), "reference.weights: shards "),
    "one bit of a weight": (one_flipped_weight, (), "reference.weights: shards "),
    "model's settings": (
        lambda scored: change_json(scored.model / "config.json", rms_norm_eps=1e-3),
        (),
        "reference.config: shards ",
    ),
    "adapter": (new_adapter, ("reference.adapter={folder}/adapter",), "reference.adapter: shards none, this run "),
    "dtype": (nothing, ("reference.dtype=bfloat16",), "reference.dtype: shards float32, this run bfloat16"),
    "quantization": (nothing, ("reference.quantization.bits=8",), "reference.quantization: shards none, this run "),
    "longer cut": (nothing, ("data.max_length=256",), "tokenization.max_length: shards 128, this run 256"),
    "no cut": (nothing, ("data.max_length=null",), "tokenization.max_length: shards 128, this run none"),
    "declared": (nothing, ("reference.declared=somebody",), "reference.declared: shards none, this run somebody"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_log_prob_depends_on_is_refused_by_its_field(scored: Scored, name: str) -> None:
    change, overrides, field = REFUSED[name]
    change(scored)
    words = tuple(word.format(folder=scored.folder) for word in overrides)
    for stage in (scored.stage_two, scored.stage_one) if name != "declared" else (scored.stage_two,):
        with pytest.raises(RefshardError) as caught:
            stage(*words)
        assert caught.value.exit_status == 78
        assert field in str(caught.value)
        assert str(scored.folder / "shards" / "train") in str(caught.value)
        # That field and no other; another end of text is another tokenizer too, and what is declared has no fields.
        assert str(caught.value).count(": shards ") == {"end of text": 2, "declared": 4}.get(name, 1)
    tally("a change on which log-probs depend", 1, outcome="78 in both stages, the field named")


def swap_columns(scored: Scored) -> None:
    write_jsonl(scored.data, [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS])


def edit_a_row(scored: Scored) -> None:
    write_jsonl(scored.data, [{**row, "chosen": row["chosen"] + "!"} if i == 5 else row for i, row in enumerate(ROWS)])


def grow(scored: Scored) -> None:
    write_jsonl(scored.data, [*ROWS, *simple_rows(3, start=100)])


CHANGED_DATA: dict[str, tuple[Callable[[Scored], None], tuple[str, ...], str, str]] = {
    "columns swapped": (swap_columns, (), "24 of 24 pairs", "pairs.jsonl:1)"),
    "columns renamed across": (
        nothing,
        ("data.columns={chosen: rejected, rejected: chosen}",),
        "24 of 24 pairs",
        "pairs.jsonl:1)",
    ),
    "one row edited": (edit_a_row, (), "1 of 24 pairs", "pairs.jsonl:6)"),
    "grown": (grow, (), "3 of 27 pairs", "pairs.jsonl:25)"),
}


@pytest.mark.parametrize("name", CHANGED_DATA)
def test_pairs_that_were_not_scored_are_counted_and_the_first_is_named(scored: Scored, name: str) -> None:
    change, overrides, count, place = CHANGED_DATA[name]
    change(scored)
    with pytest.raises(RefshardError) as caught:
        scored.stage_two(*overrides)
    assert caught.value.exit_status == 65
    assert count in str(caught.value)
    assert place in str(caught.value)
    assert "have no reference logps" in str(caught.value)
    with pytest.raises(RefshardError, match=r"differs in (columns|dataset)\b") as caught:
        scored.stage_one(*overrides)
    assert caught.value.exit_status == 78
    tally("data changed between the stages", 1, outcome="65, the pairs counted, the first named; 78 in stage one")


def shuffle_rows(scored: Scored) -> None:
    write_jsonl(scored.data, [ROWS[i] for i in np.random.default_rng(0).permutation(24)])


def move_model(scored: Scored) -> None:
    scored.model.rename(scored.folder / "moved")
    shutil.copytree(scored.folder / "moved", scored.model)


SERVED: dict[str, tuple[Callable[[Scored], None], tuple[str, ...]]] = {
    "nothing": (nothing, ()),
    "attention": (lambda scored: change_json(scored.model / "config.json", attn_implementation="eager"), ()),
    "rows in another order": (shuffle_rows, ()),
    "shards of other sizes": (nothing, ("precompute.rows_per_shard=5",)),
    "tokens in a batch": (nothing, ("precompute.tokens_per_batch=64",)),
    "a moved model": (move_model, ()),
    "a revision of a folder": (nothing, ("policy.revision=v2",)),
    "the policy's dtype": (nothing, ("policy.dtype=bfloat16", "reference.dtype=float32")),
    "the loss": (nothing, ("loss={type: ipo, beta: 0.5}",)),
    "a shorter cut": (nothing, ("data.max_length=100",)),
}


@pytest.mark.parametrize("name", SERVED)
def test_what_changes_no_log_prob_is_served_with_the_same_numbers(scored: Scored, original: Path, name: str) -> None:
    def values(table: pa.Table) -> list[Any]:
        rows = table.select([n for n in table.column_names if "logps" in n or n == "prompt_ids"]).to_pylist()
        return sorted(map(repr, rows))

    expected = values(scored.stage_two())
    change, overrides = SERVED[name]
    change(scored)
    assert len(expected) == 24
    assert values(scored.stage_two(*overrides)) == expected
    tally("a change on which no log-prob depends", 1, outcome="served, the same numbers")


def test_a_store_is_not_continued_in_units_of_another_size(scored: Scored) -> None:
    with pytest.raises(RefshardError, match="differs in rows_per_shard: shards 8, this run 5") as caught:
        scored.stage_one("precompute.rows_per_shard=5")
    assert caught.value.exit_status == 78
