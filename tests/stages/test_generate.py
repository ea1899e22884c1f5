"""`refshard generate` draws replies of the reference that it has compared with the run's, and of no other."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.base.errors import IdentityError
from pipeline.replies.records import GENERATIONS
from pipeline.replies.sampling import Sampling
from stages import generate
from support.models import make_model
from support.runs import simple_rows, write_jsonl, write_settings
from support.tally import tally


def test_a_reference_that_is_replaced_while_replies_are_drawn_gives_none(
    tmp_path: Path, model_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded after its digests were compared, and a second time after the policy."""
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    other = make_model(tmp_path / "other", tokenizer, seed=1)
    data = write_jsonl(tmp_path / "pairs.jsonl", simple_rows(2))
    write_settings(tmp_path / "run", data={"path": str(data)}, policy={"model": str(model)})

    def draw(*args: Any) -> Any:
        shutil.copy(other / "model.safetensors", model)
        return []

    monkeypatch.setattr(generate, "saved_policy", lambda folder: (4, model))
    monkeypatch.setattr(generate, "draw_both", draw)
    with pytest.raises(IdentityError, match=r"model\.safetensors: changed while it was in use"):
        generate.run(
            tmp_path / "run",
            set_name=None,
            num_prompts=2,
            sampling=Sampling(max_tokens=4, temperature=1.0, seed=0),
            reward_model=None,
        )
    assert not (tmp_path / "run" / GENERATIONS).exists()
    tally("a reference replaced while generate draws its replies", 1, outcome="78, no replies")
