"""Identity of a run's log-probs, and differences between two identities, field by field.

An identity holds everything that a log-prob depends on, and nothing else: the reference's weights and config by
content, its dtype and its adapter; tokenizer and chat template by content, the length rule, the version of the
tokenization code. Beta, learning rate, loss, LoRA rank, seed and output folder are not in it, so a sweep over them
reuses the shards. Digests are of file contents: a moved or copied model is the same reference.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pipeline.base.digests import sha256_of_file
from pipeline.base.errors import ConfigError
from pipeline.base.files import read_json
from pipeline.config.schema import Config, Dtype, ReferenceConfig
from pipeline.data.dates import asks_for_date
from pipeline.data.tokens import TOKENIZATION_VERSION
from pipeline.models import files
from pipeline.models.precision import Precision, policy_precision, recorded_precision, reference_precision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "SCHEMA_VERSION",
    "PolicyReferenceRelation",
    "TokenizerFacts",
    "as_json",
    "check_dtypes",
    "describe_differences",
    "differences",
    "differing_fields",
    "fingerprint_of",
    "identity_of_reference",
    "identity_of_run",
    "identity_of_tokenizer",
    "in_other_precision",
    "policy_reference_relation",
    "precisions_apart",
    "remedy",
]

SCHEMA_VERSION = 1
"""Version of the shards' columns and of the manifest"""

# Keys of config.json that do not change the forward pass.
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


@dataclass(frozen=True)
class TokenizerFacts:
    """All of a tokenizer that an identity depends on; stands for a tokenizer that is not loaded."""

    digest: str
    """SHA-256 of the rules from text to ids"""
    chat_template: str | None
    eos_token: str | None

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "TokenizerFacts":
        template: Any = tokenizer.chat_template
        if isinstance(template, dict):
            # The library reads them in the file system's order, which a copy changes.
            template = dict(sorted(template.items(), key=lambda named: (named[0] != "default", named[0])))
        return cls(_digest_of_tokenizer(tokenizer), str(template) if template else None, tokenizer.eos_token)


def identity_of_run(config: Config, tokenizer: "PreTrainedTokenizerBase | TokenizerFacts") -> dict[str, Any]:
    """Collect everything that a log-prob of this run's reference depends on. Reads files, loads no weights."""
    known = tokenizer if isinstance(tokenizer, TokenizerFacts) else TokenizerFacts.of(tokenizer)
    dated = config.data.template_date is not None and asks_for_date(known)
    return {
        "schema": SCHEMA_VERSION,
        "reference": identity_of_reference(config),
        "tokenization": {
            **identity_of_tokenizer(known),
            **({"template_date": config.data.template_date} if dated else {}),
            "max_length": config.data.max_length,
            "token_logps": config.precompute.token_logps,
        },
    }


def identity_of_tokenizer(known: TokenizerFacts) -> dict[str, Any]:
    """Collect what decides the token ids of a text."""
    return {
        "version": TOKENIZATION_VERSION,
        "tokenizer": known.digest,
        "chat_template": None if known.chat_template is None else _digest(known.chat_template),
        "eos": known.eos_token,
    }


def identity_of_reference(config: Config) -> dict[str, Any]:
    """Collect the reference's identity: digests of weights, config and adapter; precision."""
    if config.reference.declared is not None:
        return {"declared": config.reference.declared}
    model, adapter = files.reference_sources(config)
    model_config, weights = files.reference_weights(model)
    kept = {key: value for key, value in model_config.items() if key not in _IRRELEVANT_CONFIG}
    quantization, precision = files.reference_quantization(config), reference_precision(config)
    return {
        "weights": _digest("".join(f"{name}:{digest}\n" for name, digest in sorted(weights.items()))),
        "config": _digest(json.dumps(kept, sort_keys=True)),
        **_zeroed_position(model_config),
        "dtype": precision.weights,
        # Without autocast the identity is that of stores from before it was recorded.
        **({} if precision.autocast is None else {"autocast": precision.autocast}),
        "adapter": None if adapter is None else _digest_of_adapter(adapter),
        "quantization": None if quantization is None else dataclasses.asdict(quantization),
    }


def _zeroed_position(model_config: Mapping[str, Any]) -> dict[str, int]:
    """Name the position that the padding token's id takes out of XGLM's table of sines; nothing if all are whole.

    Only there does that id decide a log-prob. The table begins with two rows of no position, and XGLM's own padding
    token is one of them.
    """
    row = model_config.get("pad_token_id")
    if model_config.get("model_type") != "xglm" or not isinstance(row, int) or row < 2:
        return {}
    return {"zeroed_position": row - 2}


@dataclass(frozen=True)
class PolicyReferenceRelation:
    """Conditions under which the policy and its reference are the same model."""

    at_start: bool
    """The policy before training is the reference, except for the precision"""
    adapters_off: bool
    """The policy with its adapter switched off is the reference, at any step"""
    frozen_adapter: Path | None
    """Adapter with which, in place of its own, the policy is the reference, at any step"""


def policy_reference_relation(config: Config) -> PolicyReferenceRelation:
    """Compare policy and reference by content. Reads files, loads no weights."""
    if config.reference.declared is not None:
        return PolicyReferenceRelation(False, False, None)
    reference = identity_of_reference(config)
    own = identity_of_reference(dataclasses.replace(config, reference=ReferenceConfig()))
    base = ("weights", "config", "zeroed_position", "quantization")
    same_base = all(reference.get(key) == own.get(key) for key in base)
    at_start = same_base and reference["adapter"] == own["adapter"]
    return PolicyReferenceRelation(
        at_start=at_start,
        adapters_off=same_base and reference["adapter"] is None and config.policy.has_adapter,
        frozen_adapter=files.reference_sources(config)[1] if at_start else None,
    )


def as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Give an identity as JSON gives it back, without tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """Give the SHA-256, in hex, of the identity as canonical JSON (sorted keys, no spaces)."""
    return _digest(json.dumps(identity, sort_keys=True, separators=(",", ":")))


def differing_fields(stored: Mapping[str, Any], run: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """List the fields in which two nested mappings differ: full name and both values; a missing value is None."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*stored, *run}):
        old, new = stored.get(key), run.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differing_fields(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((f"{prefix}{key}", old, new))
    return found


def describe_differences(stored: Mapping[str, Any], run: Mapping[str, Any], whose: str = "shards") -> list[str]:
    """Name every differing field with both values side by side; `whose` names the stored ones."""
    return [
        f"{field}: {whose} {_show(old)}, this run {_show(new)}" for field, old, new in differing_fields(stored, run)
    ]


def differences(
    stored: Mapping[str, Any], run: Mapping[str, Any], *, joining: bool, exact: int | None = None
) -> list[str]:
    """Name every field in which a store's identity does not serve the run, both values side by side.

    Stage one writes into the store and needs an equal identity. Stage two (`joining`) accepts a store that holds more
    than it needs: if token logps are stored, `max_length` may be larger, up to the reference's `exact` length, and
    `token_logps` may differ.
    """
    if not joining:
        return describe_differences(stored, run)
    ours, theirs = stored["tokenization"], run["tokenization"]
    reason = "the shards were cut shorter than this run wants"
    if not ours["token_logps"]:
        reason = "the shards hold no token logps, so it must be equal"
    # Log-probs of a causal model do not depend on the tail, up to its exact length.
    kept, wanted = ours["max_length"], theirs["max_length"]
    serves = ours["token_logps"] and (kept is None or (wanted is not None and kept >= wanted))
    if exact is not None and (kept is None or kept > exact):
        serves, reason = (
            False,
            f"with pairs of more than {exact} tokens, this reference's log-probs depend on the batch",
        )
    found = []
    for text in describe_differences(stored, run):
        field = text.partition(":")[0]
        if field == "tokenization.max_length" and not serves:
            found.append(f"{text}; {reason}")
        elif field not in ("tokenization.max_length", "tokenization.token_logps"):
            found.append(text)
    return found


def remedy(stored: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Name the settings with which a run uses a store whose reference differs in the precision alone, as a sentence.

    Empty if other fields differ, and if the gate would refuse the store's wider precision.
    """
    fields = {field for field, *_ in differing_fields(stored["reference"], run["reference"])}
    theirs, ours = recorded_precision(stored["reference"]), recorded_precision(run["reference"])
    if not fields or not fields <= {"dtype", "autocast"} or theirs.bits > ours.bits:
        return ""
    second = "" if theirs.autocast is None else f" and reference.autocast: {theirs.autocast}"
    return f" To use these as they are, set reference.dtype: {theirs.weights}{second}."


def in_other_precision(fingerprint: str, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Give a run's identity in the precision in which it has a fingerprint; None if it has it in none."""
    kept = {key: value for key, value in run["reference"].items() if key != "autocast"}
    for dtype, autocast in itertools.product(get_args(Dtype), (None, "bfloat16", "float16")):
        precision = {"dtype": dtype} if autocast is None else {"dtype": dtype, "autocast": autocast}
        identity = {**run, "reference": {**kept, **precision}}
        if fingerprint_of(identity) == fingerprint:
            return identity
    return None


def _show(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _digest_of_adapter(folder: Path) -> str:
    config = read_json(folder / files.ADAPTER_CONFIG)
    # The base model's place when the adapter was saved does not change what it computes.
    kept = {k: v for k, v in config.items() if k not in ("base_model_name_or_path", "revision", "inference_mode")}
    return _digest(json.dumps(kept, sort_keys=True) + sha256_of_file(folder / files.ADAPTER_WEIGHTS))


def _digest_of_tokenizer(tokenizer: Any) -> str:
    """Digest the rules from text to ids. Truncation and padding are left out, since calls change them."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    return _digest(json.dumps([rules, special], sort_keys=True))


def precisions_apart(config: Config) -> tuple[Precision, Precision] | None:
    """Give the precisions of reference and policy if the settings set them apart; None if one model starts as both."""
    if config.reference.dtype == "auto" and config.reference.autocast is None:
        return None
    relation = policy_reference_relation(config)
    if not (relation.at_start or relation.adapters_off):
        return None
    reference, policy = reference_precision(config), policy_precision(config)
    return None if reference == policy else (reference, policy)


def check_dtypes(config: Config) -> None:
    """Refuse, as the gate would after scoring, a policy that starts as its reference but computes in fewer digits."""
    apart = precisions_apart(config)
    if config.train.on_mismatch == "warn" or apart is None:
        return
    reference, policy = apart
    if policy.bits < reference.bits:
        raise ConfigError(
            f"reference.dtype: must be left out, or be no wider than {policy}, in which the policy trains, got "
            f"{reference}: their log-ratios would not start at 0. Leave reference.dtype out"
        )
