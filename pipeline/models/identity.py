"""What makes a shard valid for a run, and a mismatch explained field by field.

The identity has everything that a log-prob depends on, and nothing else: the reference's weights and config by
content, its dtype, its adapter; tokenizer and chat template by content, the length rule, the version of the
tokenization code. Beta, learning rate, loss, LoRA rank, seed and output folder never enter, so a sweep over them
reuses the shards. Digests are of file contents: a model moved or copied is still the same reference.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base.digests import sha256_of_file
from pipeline.base.errors import ConfigError
from pipeline.base.files import read_json
from pipeline.config.schema import Config, ReferenceConfig
from pipeline.data.tokens import TOKENIZATION_VERSION
from pipeline.models.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    find_adapter,
    policy_dtype,
    reference_dtype,
    reference_quantization,
    reference_sources,
    reference_weights,
    resolve_dtype,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "SCHEMA_VERSION",
    "Kinship",
    "check_dtypes",
    "differences",
    "fingerprint_of",
    "identity_of_reference",
    "identity_of_run",
    "kinship",
    "significand_bits",
]

SCHEMA_VERSION = 1
"""Version of the shards' columns and of the manifest."""


# Keys of config.json that say nothing about what the forward pass computes.
_IRRELEVANT_CONFIG = frozenset(
    {
        "_name_or_path",
        "_attn_implementation_autoset",
        "architectures_version",
        "attn_implementation",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def identity_of_run(config: Config, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Collect what a log-prob of this run's reference depends on. Reads files, loads no weights.

    Returns:
        Nested dict of strings and numbers: `schema`, `reference`, `tokenization`.
    """
    return {
        "schema": SCHEMA_VERSION,
        "reference": identity_of_reference(config),
        "tokenization": {
            "version": TOKENIZATION_VERSION,
            "tokenizer": _digest_of_tokenizer(tokenizer),
            "chat_template": _digest(str(tokenizer.chat_template)) if tokenizer.chat_template else None,
            "eos": tokenizer.eos_token,
            "max_length": config.data.max_length,
            "token_logps": config.precompute.token_logps,
        },
    }


def identity_of_reference(config: Config) -> dict[str, Any]:
    """Collect what makes the reference what it is: digests of weights, config and adapter, dtype, quantization."""
    if config.reference.declared is not None:
        return {"declared": config.reference.declared}
    model, adapter = reference_sources(config)
    settings, weights = reference_weights(model)
    quantization = reference_quantization(config)
    return {
        "weights": _digest("".join(f"{name}:{digest}\n" for name, digest in sorted(weights.items()))),
        "config": _digest_of_config(settings),
        "dtype": resolve_dtype(config.reference.dtype, settings),
        "adapter": None if adapter is None else _digest_of_adapter(adapter),
        "quantization": None if quantization is None else dataclasses.asdict(quantization),
    }


@dataclass(frozen=True)
class Kinship:
    """Where the policy and its reference are the same model."""

    at_start: bool
    """The policy before training is the reference, dtype aside."""
    adapters_off: bool
    """The policy with its adapter switched off is the reference, at any step."""
    frozen_adapter: Path | None
    """With this adapter in place of its own, the policy is the reference, at any step."""


def kinship(config: Config) -> Kinship:
    """Tell by content where policy and reference must agree. Reads files, loads no weights."""
    if config.reference.declared is not None:
        return Kinship(False, False, None)
    reference = identity_of_reference(config)
    own = identity_of_reference(dataclasses.replace(config, reference=ReferenceConfig()))
    same_base = all(reference[key] == own[key] for key in ("weights", "config", "quantization"))
    at_start = same_base and reference["adapter"] == own["adapter"]
    return Kinship(
        at_start=at_start,
        adapters_off=same_base and reference["adapter"] is None and config.policy.has_adapter,
        frozen_adapter=(
            find_adapter(config.policy.adapter, "policy.adapter") if at_start and config.policy.adapter else None
        ),
    )


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of the identity as canonical JSON (sorted keys, no spaces)."""
    return _digest(json.dumps(identity, sort_keys=True, separators=(",", ":")))


def differences(stored: Mapping[str, Any], run: Mapping[str, Any], *, joining: bool) -> list[str]:
    """Name every field in which a store's identity does not serve the run, both values side by side.

    Args:
        stored: Identity in the store's manifest.
        run: Identity of this run.
        joining: True for stage two, which only needs the store to hold enough: where token logps are stored, a
            larger or equal `max_length` serves, and whether token logps are stored is no matter. False for stage
            one, which writes into the store and needs it equal.
    """
    found = []
    for field, (a, b) in sorted(_flatten_pair(stored, run).items()):
        if a == b:
            continue
        if joining and field == "tokenization.token_logps":
            continue
        if joining and field == "tokenization.max_length":
            if stored["tokenization"]["token_logps"] and _covers(a, b):
                continue
            reason = (
                "; the shards hold no token logps, so it must be equal"
                if not stored["tokenization"]["token_logps"]
                else "; the shards were cut shorter than this run wants"
            )
            found.append(f"{field}: shards {_show(a)}, this run {_show(b)}{reason}")
            continue
        found.append(f"{field}: shards {_show(a)}, this run {_show(b)}")
    return found


def _covers(stored: int | None, run: int | None) -> bool:
    """Log-probs of a causal model do not see the tail: a longer cut holds every shorter one."""
    return stored is None or (run is not None and stored >= run)


def _flatten_pair(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    fields: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            fields.update(_flatten_pair(x, y, f"{prefix}{key}."))
        else:
            fields[f"{prefix}{key}"] = (x, y)
    return fields


def _show(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _digest_of_config(settings: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in settings.items() if key not in _IRRELEVANT_CONFIG}
    return _digest(json.dumps(kept, sort_keys=True))


def _digest_of_adapter(folder: Path) -> str:
    config = read_json(folder / ADAPTER_CONFIG)
    # Where the base model lay when the adapter was saved says nothing about what it computes.
    kept = {k: v for k, v in config.items() if k not in ("base_model_name_or_path", "revision", "inference_mode")}
    return _digest(json.dumps(kept, sort_keys=True) + sha256_of_file(folder / ADAPTER_WEIGHTS))


def _digest_of_tokenizer(tokenizer: Any) -> str:
    """Digest what turns text into ids. Truncation and padding are left out: calls change them."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return _digest(json.dumps([rules, special], sort_keys=True))


def check_dtypes(config: Config) -> None:
    """Refuse, before an hour of scoring, log-probs that the gate would refuse after it.

    Raises:
        ConfigError: The policy starts as its reference, but computes in fewer digits than the reference is scored in.
    """
    kin = kinship(config)
    if config.train.on_mismatch == "warn" or not (kin.at_start or kin.adapters_off):
        return
    policy, reference = policy_dtype(config), reference_dtype(config)
    if significand_bits(policy) < significand_bits(reference):
        raise ConfigError(
            f"reference.dtype: the reference would be scored in {reference}, but the policy trains in {policy}, so "
            f"their log-ratios would not start at 0. Set reference.dtype: {policy}"
        )


def significand_bits(dtype: str) -> int:
    """Bits of the significand."""
    return {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}.get(dtype, 24)
