"""The best checkpoint's weights replace all of the policy's, and a pair counts by its weight in the whole step."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers

from pipeline.training.trainer import PairTrainer

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def make_policy(kind: str) -> Any:
    if kind == "experts":
        # Their weights are saved one by one, and merged on loading.
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=2))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=kind == "tied"))
    if kind == "adapter":
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    return model


@pytest.mark.parametrize("kind", ["plain", "tied", "experts", "adapter"])
def test_all_weights_of_the_best_checkpoint_are_loaded(kind: str, tmp_path: Path) -> None:
    policy = make_policy(kind)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_()
    best = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.save_pretrained(tmp_path / "checkpoint-2")
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(1.0)

    trainer: Any = object.__new__(PairTrainer)
    trainer.model, trainer.deepspeed, trainer.is_fsdp_enabled = policy, None, False
    trainer.state = SimpleNamespace(best_model_checkpoint="where it was saved/checkpoint-2")
    trainer.load_best(tmp_path / "checkpoint-2", transformers.AutoModelForCausalLM.from_pretrained)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert all(torch.equal(value, best[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_an_evaluation_that_is_not_finite_is_never_the_best(
    greater_is_better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = object.__new__(PairTrainer)
    trainer.args = SimpleNamespace(
        metric_for_best_model="rewards/margins",
        greater_is_better=greater_is_better,
        save_strategy="steps",
        device=torch.device("cpu"),
    )
    trainer.state = SimpleNamespace(best_metric=None, best_global_step=None, global_step=1)
    trainer._margins = None
    found = []
    for value in (math.nan, math.inf, -math.inf, 0.5, math.inf, -math.inf, math.nan):
        monkeypatch.setattr(
            transformers.Trainer, "evaluate", lambda *args, value=value: {"eval_rewards/margins": value}
        )
        found.append(trainer._determine_best_metric(trainer.evaluate(), None))
    assert (found.index(True), sum(found), trainer.state.best_metric) == (3, 1, 0.5)


def test_the_mean_over_micro_batches_and_processes_is_that_of_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with two micro-batches each, of other sums of weights."""
    weights = [[torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.5])], [torch.tensor([4.0]), torch.tensor([1.0, 3.0])]]
    losses = [[torch.tensor([1.0, 5.0]), torch.tensor([2.0, 0.0])], [torch.tensor([7.0]), torch.tensor([3.0, 1.0])]]
    whole = (
        torch.cat([each for rank in weights for each in rank]),
        torch.cat([each for rank in losses for each in rank]),
    )
    sums = [sum(float(each.sum()) for each in rank) for rank in weights]
    found = []
    for rank in range(2):
        samples = [{"joined": SimpleNamespace(weights=each)} for each in weights[rank]]
        monkeypatch.setattr(transformers.Trainer, "get_batch_samples", lambda *_, samples=samples: (samples, None))
        trainer: Any = object.__new__(PairTrainer)
        trainer.args = SimpleNamespace(device=torch.device("cpu"))
        trainer.accelerator = SimpleNamespace(gather=lambda own: torch.tensor(sums))
        trainer.get_batch_samples(None, 2, None)
        micro = [(w * x).sum() / trainer._total_weight for w, x in zip(weights[rank], losses[rank], strict=True)]
        found.append(sum(micro) / 2)  # as the library divides by the micro-batches of a step
    mean = (whole[0] * whole[1]).sum() / whole[0].sum()
    assert float(sum(found) / 2) == pytest.approx(float(mean), rel=1e-6)
