"""A moved reference is checked before each use, and made again from what is whole, or from nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeline.base.errors import DataError, IdentityError
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from pipeline.run.checkpoints import commit_checkpoint
from pipeline.training.mixing import MARKER
from pipeline.training.windows import first_reference, prepare_reference

WEIGHTS = "model.safetensors"
SYNC = {"sync": {"steps": 2, "mixup_alpha": 0.5}}


class Run:
    """A run with a checkpoint at steps 2 and 4, and the moved references that are made of them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.output = config.train.folder
        for step in (2, 4):
            model = transformers.AutoModelForCausalLM.from_pretrained(config.policy.model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.0 + step / 10)
            folder = self.output / f"checkpoint-{step}"
            model.save_pretrained(folder)
            commit_checkpoint(folder, step, {})

    def prepare(self, step: int) -> bytes:
        prepare_reference(self.config, step, self.output)
        return (self.reference(step) / WEIGHTS).read_bytes()

    def reference(self, step: int) -> Path:
        return self.output / "references" / f"step-{step:08d}"


@pytest.fixture
def run(make_run: Callable[..., Path]) -> Run:
    return Run(load_config(make_run(reference=SYNC)))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def test_a_damaged_reference_is_made_again_with_its_log_probs(run: Run) -> None:
    right = run.prepare(2)
    shards = run.reference(2) / "shards"
    shards.mkdir()
    assert run.prepare(2) == right and shards.exists()
    for damage in (WEIGHTS, "config.json", MARKER):
        flip(run.reference(2) / damage)
        assert run.prepare(2) == right and not shards.exists()


def test_a_damaged_reference_is_made_again_before_the_next_one_is_mixed_from_it(run: Run) -> None:
    first, second = run.prepare(2), run.prepare(4)
    shutil.rmtree(run.reference(4))
    flip(run.reference(2) / WEIGHTS)
    assert run.prepare(4) == second
    assert (run.reference(2) / WEIGHTS).read_bytes() == first


@pytest.mark.parametrize("fate", ["gone", "damaged"])
def test_without_its_checkpoint_a_damaged_reference_stays_and_is_named(run: Run, fate: str) -> None:
    right, checkpoint = run.prepare(2), run.output / "checkpoint-2"
    shutil.rmtree(checkpoint) if fate == "gone" else flip(checkpoint / WEIGHTS)
    # A whole one needs no checkpoint.
    assert run.prepare(2) == right
    flip(run.reference(2) / WEIGHTS)
    with pytest.raises(
        DataError, match=f"{run.reference(2)}: .*{WEIGHTS} has another SHA-256; nor is {checkpoint} whole"
    ):
        run.prepare(2)
    assert run.reference(2).exists()
    with pytest.raises(DataError, match="step-00000002"):
        run.prepare(4)
    assert not run.reference(4).exists()


def test_a_reference_of_an_earlier_version_is_used_as_it_is(run: Run) -> None:
    right, marker = run.prepare(2), run.reference(2) / MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text())["identity"]))
    before = marker.stat().st_ino
    assert run.prepare(2) == right and marker.stat().st_ino == before
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "sync": {"steps": 2, "mixup_alpha": 0.1}}))
    run.prepare(2)
    assert "digest" in json.loads(marker.read_text())


def test_a_run_of_a_first_reference_in_another_dtype_is_told_the_setting_that_goes_on(
    run: Run, make_run: Callable[..., Path], tokenizer: Any
) -> None:
    file = make_run(reference=SYNC)
    earlier, wider, other = (
        load_config(file, [word])
        for word in ("reference.dtype=bfloat16", "policy.dtype=bfloat16", "data.max_length=64")
    )
    commit_checkpoint(
        run.output / "checkpoint-4", 4, {"fingerprints": first_reference(earlier, tokenizer, overwrite=True)}
    )
    with pytest.raises(
        IdentityError, match=r"scored in bfloat16, .* float32\. To use .* set reference\.dtype: bfloat16\."
    ):
        first_reference(run.config, tokenizer)
    shards = run.reference(2) / "shards"
    shards.mkdir(parents=True)
    with pytest.raises(IdentityError, match=f"Delete {shards} too"):
        first_reference(run.config, tokenizer)
    # The settings that it names go on; what else differs is named elsewhere.
    for config in (earlier, other):
        first_reference(config, tokenizer)
    # No setting lets a policy begin on a reference of more digits.
    commit_checkpoint(
        run.output / "checkpoint-4", 4, {"fingerprints": first_reference(run.config, tokenizer, overwrite=True)}
    )
    first_reference(wider, tokenizer)
