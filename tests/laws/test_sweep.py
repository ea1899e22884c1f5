"""One set of shards serves every loss, beta, smoothing, adapter rank, seed, smaller max_length and ld_alpha."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from pipeline.config.loss import LossName
from pipeline.config.reader import load_config
from pipeline.models import loading
from pipeline.scoring import scorer
from stages import train
from support.models import make_model
from support.runs import logged_steps, refshard, simple_rows
from support.stores import digests

pytestmark = pytest.mark.slow

MakeRun = Callable[..., Path]

SMOOTHED = {"exo_pair": "0.01", "robust": "0.1", "aot": "0.1"}

SWEEP: dict[str, list[str]] = {
    **{
        name: [f"loss.type={name}", *([f"loss.label_smoothing={SMOOTHED[name]}"] if name in SMOOTHED else [])]
        for name in LossName.__args__  # type: ignore[attr-defined]
    },
    "sigmoid + sft": ["loss.type=[sigmoid, sft]", "loss.weights=[1, 0.2]"],
    "beta": ["loss.beta=0.7"],
    "label smoothing": ["loss.label_smoothing=0.2"],
    "forward kl": ["loss.f_divergence_type=forward_kl"],
    "wpo": ["loss.use_weighting=true"],
    "ld_alpha": ["loss.ld_alpha=0.3"],
    "ld_alpha, shorter": ["loss.ld_alpha=0.3", "data.max_length=36"],
    "shorter": ["data.max_length=36"],
    "lora, rank 2": ["policy.lora.r=2"],
    "lora, rank 8": ["policy.lora.r=8"],
    "another seed": ["train.seed=5"],
    "lora, another seed": ["policy.lora.r=2", "train.seed=5"],
    "ia3": ["policy.ia3.target_modules=[k_proj, v_proj]"],
}


def test_a_sweep_leaves_the_shards_as_they_are_and_loads_no_reference(
    make_run: MakeRun, tmp_path: Path, tokenizer: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another model than the policy, so that loading it would be seen.
    reference = make_model(tmp_path / "reference", tokenizer, seed=3)
    config = make_run(rows=simple_rows(16), reference={"model": str(reference)}, train={"max_steps": 3})
    refshard("precompute", "--config", config)
    before = digests(tmp_path / "shards")

    loaded: list[Path] = []
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained

    def counting(folder: Path, **settings: Any) -> Any:
        loaded.append(Path(folder))
        return from_pretrained(folder, **settings)

    def refusing(*arguments: Any) -> Any:
        raise AssertionError("stage two loads no reference")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", counting)
    monkeypatch.setattr(scorer, "load_reference", refusing)
    monkeypatch.setattr(loading, "load_plain", refusing)
    trajectories: dict[str, tuple[float, ...]] = {}
    for number, (name, overrides) in enumerate(SWEEP.items()):
        output = tmp_path / str(number)
        train.run(load_config(config, [*overrides, f"train.output_dir={output}"]))
        trajectories[name] = tuple(entry["loss"] for entry in logged_steps(output))
        assert len(set(trajectories[name])) == 3, name

    assert loaded == [model_folder] * len(SWEEP)
    assert digests(tmp_path / "shards") == before
    # Every option did something: no two runs are the same (sigmoid is the rest's default).
    assert len(set(trajectories.values())) == len(SWEEP)
