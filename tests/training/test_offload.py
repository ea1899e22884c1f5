"""Ways to train with less memory or time: each gives the losses and the weights of the plain run, on packed batches."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers

from pipeline.config.loss import LossConfig
from pipeline.scoring.forward import prepare
from pipeline.scoring.selfcheck import check_scoring
from pipeline.training import offload
from pipeline.training.batches import Collator
from pipeline.training.offload import ActivationOffload
from pipeline.training.trainer import PairTrainer
from support.models import GROUPED, VOCABULARY

pytestmark = pytest.mark.slow

STEPS = 4


def make_pairs(count: int) -> datasets.Dataset:
    """Every batch of another length, with prompts and completions that pairs share."""
    generator = torch.Generator().manual_seed(0)

    def ids(shortest: int, longest: int) -> list[int]:
        n = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()

    rows: list[dict[str, Any]] = []
    for i in range(count):
        shared = i % 3 == 2
        rows.append(
            {
                "row": i,
                "pair_key": i.to_bytes(16, "big"),
                "prompt_ids": rows[-1]["prompt_ids"] if shared else ids(2, 9),
                "chosen_ids": rows[-1]["rejected_ids"] if shared else ids(1, 14),
                "rejected_ids": ids(1, 14),
                "ref_chosen_logps": -3.0 * (i % 4),
                "ref_rejected_logps": -40.0 + i,
                "truncated": False,
            }
        )
    return datasets.Dataset.from_list(rows)


class Recorder(PairTrainer):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.losses: list[float] = []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def make_model(*, lora: bool, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))
    if lora:
        adapter = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"]
        )
        model = peft.get_peft_model(model, adapter)
    return model.to(dtype)


def train(
    folder: Path,
    *,
    lora: bool = False,
    dtype: torch.dtype = torch.float32,
    packed: bool = True,
    offloaded: bool = False,
    **arguments: Any,
) -> tuple[list[float], dict[str, torch.Tensor], Recorder]:
    """Train for a few steps of plain SGD, whose weights move by the gradient times a constant."""
    model = make_model(lora=lora, dtype=dtype)
    prepare(model)
    assert check_scoring(model, "policy.model") == "packed"
    if lora and arguments.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 5,
        "max_steps": STEPS,
        "optim": "sgd",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "label_names": [],
        **arguments,
    }
    trainer = Recorder(
        loss=LossConfig(),
        activation_offload=offloaded,
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **settings),
        data_collator=Collator(0, None, packed=packed),
        train_dataset=make_pairs(5 * STEPS),
    )
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    if not settings.get("torch_compile"):
        model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("self_attn"))).register_forward_hook(
            count
        )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    if not settings.get("torch_compile"):
        # Each layer once more in backward, where its activations were not kept.
        assert passes == (2 * STEPS if settings.get("gradient_checkpointing") else STEPS)
    moved = {name: (p.detach() - before[name]) for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainer.losses) == STEPS and any(change.abs().max() > 0 for change in moved.values())
    return trainer.losses, moved, trainer


_plain: dict[str, tuple[list[float], dict[str, torch.Tensor]]] = {}


def plain(folder: Path, **way: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    if str(way) not in _plain:
        _plain[str(way)] = train(folder, **way)[:2]
    return copy.deepcopy(_plain[str(way)])


def check_same(found: Any, wanted: Any, *, loss: float, change: float) -> None:
    assert found[0] == pytest.approx(wanted[0], abs=loss)
    assert len(set(wanted[0])) == STEPS
    assert found[1].keys() == wanted[1].keys()
    for name, moved in wanted[1].items():
        gap = (found[1][name] - moved).abs().max()
        assert gap <= change * moved.abs().max() + 1e-9, f"{name}: {gap:.2g} of {moved.abs().max():.2g}"


CHECKPOINTING: Mapping[str, Any] = {"gradient_checkpointing": True}
REENTRANT = {**CHECKPOINTING, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
NOT_REENTRANT = {**CHECKPOINTING, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
# Traced as for any compiler, forward and backward; what runs is not compiled any further, which takes long.
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
TRACED = {"torch_compile": True, "torch_compile_backend": "eager"}

WAYS: dict[str, Mapping[str, Any]] = {
    "padded": {"packed": False},
    "checkpointing, reentrant": REENTRANT,
    "checkpointing, not reentrant": NOT_REENTRANT,
    "offload": {"offloaded": True},
    "offload and checkpointing, reentrant": {**REENTRANT, "offloaded": True},
    "offload and checkpointing, not reentrant": {**NOT_REENTRANT, "offloaded": True},
    "compiled": COMPILED,
    "compiled, checkpointing, offload": {**TRACED, **NOT_REENTRANT, "offloaded": True},
}
# Compiling takes seconds, so each of the two is compiled once.
CASES = [
    *((way, lora) for way in WAYS for lora in (False, True) if "compiled" not in way),
    ("compiled", False),
    ("compiled, checkpointing, offload", True),
]


@pytest.fixture(autouse=True)
def offload_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tensors of a tiny model are small ones.
    monkeypatch.setattr(ActivationOffload.__init__, "__defaults__", (64,))


@pytest.mark.parametrize(("way", "lora"), CASES)
def test_float32_numbers_are_those_of_the_plain_run(tmp_path: Path, way: str, lora: bool) -> None:
    torch._dynamo.reset()
    *found, trainer = train(tmp_path, lora=lora, **WAYS[way])
    check_same(found, plain(tmp_path, lora=lora), loss=2e-6, change=2e-4)
    if way == "offload":
        # On a CPU a copy changes no bit.
        wanted = plain(tmp_path, lora=lora)
        assert found[0] == wanted[0]
        assert all(torch.equal(found[1][name], change) for name, change in wanted[1].items())
    if "offload" in way:
        assert trainer._offload is not None and trainer._offload.num_bytes > 10_000
    else:
        assert trainer._offload is None


@pytest.mark.parametrize("extra", [{}, NOT_REENTRANT, {"offloaded": True}, {"packed": False}], ids=str)
@pytest.mark.parametrize("kind", ["autocast", "bf16 weights"])
def test_bf16_numbers_are_those_of_float32_within_its_rounding(
    tmp_path: Path, kind: str, extra: Mapping[str, Any]
) -> None:
    way: dict[str, Any] = {"bf16": True} if kind == "autocast" else {"dtype": torch.bfloat16}
    losses, moved, _ = train(tmp_path, **way, **extra)
    wanted = plain(tmp_path)
    assert losses == pytest.approx(wanted[0], rel=0.1, abs=0.05)
    if kind == "autocast":
        for name, change in wanted[1].items():
            assert torch.nn.functional.cosine_similarity(moved[name].flatten(), change.flatten(), dim=0) > 0.98, name
    if extra and extra.get("packed") is not False:
        same = plain(tmp_path, **way)
        check_same((losses, moved), same, loss=1e-6, change=1e-6)


def test_batches_of_all_shapes_share_what_was_compiled(tmp_path: Path) -> None:
    """Once for the first shape, once for all shapes; a graph for every layout would pass any limit."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=3):
        _, _, trainer = train(tmp_path, **TRACED)
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 24


# The offload by itself.


def test_parameters_their_views_and_small_tensors_stay() -> None:
    layer = torch.nn.Linear(64, 64)
    kept = ActivationOffload(layer, smallest_bytes=1024)
    x = torch.randn(32, 64, requires_grad=True)
    with kept:
        # Saves its input and the weight's transpose; a scalar is small.
        loss = (layer(x) * torch.tensor(2.0)).sum()
    assert kept.num_bytes == x.numel() * 4
    found = torch.autograd.grad(loss, [x, *layer.parameters()])
    wanted = torch.autograd.grad((layer(x) * 2.0).sum(), [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    # Outside nothing is moved.
    layer(x).sum()
    assert kept.num_bytes == x.numel() * 4


def test_what_is_kept_is_a_copy_with_the_strides_that_it_had() -> None:
    kept = ActivationOffload(torch.nn.Identity(), smallest_bytes=0)
    x = torch.randn(3, 5, dtype=torch.float64).t()
    packed = kept._pack(x)
    fetched = offload._fetch(packed)
    assert torch.equal(fetched, x) and fetched.stride() == x.stride()
    assert fetched.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_an_error_in_forward_leaves_no_hook_behind() -> None:
    kept = ActivationOffload(torch.nn.Identity(), smallest_bytes=0)
    x = torch.randn(8, requires_grad=True)
    with pytest.raises(KeyError), kept:
        raise KeyError
    x.exp().sum().backward()
    assert kept.num_bytes == 0
