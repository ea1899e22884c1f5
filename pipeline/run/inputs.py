"""Inputs of an attempt: one record for `inputs.json` and for the model card."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.base.files import read_json
from pipeline.config.schema import Config, PolicyConfig
from pipeline.models.files import NamedModel
from pipeline.models.precision import resolve_dtype
from pipeline.store.store import Store

__all__ = ["PolicyInputs", "ReferenceInputs", "RunInputs", "SetInputs", "describe_policy", "describe_reference"]


@dataclass(frozen=True, kw_only=True)
class ReferenceInputs:
    """The reference whose log-probs are trained on."""

    name: str
    identity: Mapping[str, Any]
    """The manifest's identity of the reference"""
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class PolicyInputs:
    """The policy before training."""

    model: str
    adapter: str | None
    """The trained adapter, described for people; None if all weights are trained"""
    dtype: str | None
    parameters: int
    trained_parameters: int
    widened: str | None = None
    """Dtypes of the trained weights and of their narrower checkpoint, for people; None with an adapter, or if equal"""


@dataclass(frozen=True, kw_only=True)
class SetInputs:
    """A set after the join to its store."""

    dataset: str
    """Source of the rows, described for people"""
    ledger: Mapping[str, Any]
    """Counts of rows read, kept, and dropped by reason"""
    matched: int
    """Number of pairs with reference log-probs"""
    missing: int
    tokens: Mapping[str, int]
    """Number of tokens of all joined prompts, chosen and rejected completions"""
    store: str | None
    """Folder of the store; None if no pair of the set is scored (a window that does not use it)"""
    noise: Mapping[str, Any] | None
    """The store's noise floor; None without a store"""
    of_epoch: int | None = None
    """Number of pairs of an epoch, by the set's fraction; None for a held-out set"""


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """Inputs of an attempt."""

    reference: ReferenceInputs | None
    """None if the loss has none"""
    policy: PolicyInputs
    sets: Mapping[str, SetInputs]
    stage_one: list[dict[str, Any]]
    """Costs of stage one, as its workers have recorded them"""


def describe_policy(config: PolicyConfig, policy: Any) -> PolicyInputs:
    """Describe the loaded policy, before it is trained."""
    adapter = None
    if config.lora:
        adapter = f"LoRA, rank {config.lora.r}, alpha {config.lora.alpha:g}, on {config.lora.target_modules}"
    elif config.ia3:
        adapter = f"IA3, on {config.ia3.target_modules or 'the layers usual for its architecture'}"
    elif config.adapter:
        adapter = f"adapter {config.adapter}"
    parameters = list(policy.parameters())
    return PolicyInputs(
        model=config.model,
        adapter=adapter,
        dtype=config.dtype,
        parameters=sum(p.numel() for p in parameters),
        trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        widened=None if adapter else _widened(config, policy.dtype),
    )


def _widened(config: PolicyConfig, dtype: Any) -> str | None:
    """Tell that weights of `dtype` are larger than those of the policy's checkpoint; None if they are not."""
    folder = NamedModel(config.model, config.revision, "policy.model").folder(weights=False)
    ours, checkpoint = str(dtype).removeprefix("torch."), resolve_dtype("auto", read_json(folder / "config.json"))
    if (ours, checkpoint) not in (("float32", "bfloat16"), ("float32", "float16")):
        return None
    return f"{ours}, twice as large as the {checkpoint} checkpoint"


def describe_reference(config: Config, stores: Mapping[str, Store]) -> ReferenceInputs | None:
    """Name the reference that a run's stores were scored with; None if it has no store."""
    # All stores are of one reference; a window that only evaluates has none of the training set.
    store = next(iter(stores.values()), None)
    if store is None:
        return None
    name = config.reference.declared or config.reference.model or config.policy.model
    if adapter := store.manifest["declared"].get("reference_adapter"):
        name += f" with adapter {adapter}"
    if sync := config.reference.sync:
        # The last window's own reference is a folder that the run deletes.
        name += f", moved toward the policy every {sync.steps} steps (alpha {sync.mixup_alpha:g})"
    return ReferenceInputs(name=name, identity=store.manifest["identity"]["reference"], fingerprint=store.fingerprint)
