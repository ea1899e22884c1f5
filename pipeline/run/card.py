"""The model card of a trained policy: its data, its reference, its settings."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.base.errors import one_line
from pipeline.base.versions import library_versions
from pipeline.config.schema import Config, LossConfig
from pipeline.data.sources import open_source
from pipeline.run.inputs import RunInputs

__all__ = ["hub_names", "model_card"]


def model_card(
    inputs: RunInputs,
    *,
    name: str,
    pairs: int,
    loss: Mapping[str, Any],
    hub: Mapping[str, Any],
    training: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> str:
    """Write the card as Markdown with the hub's YAML header.

    Names come from settings and data, so they are quoted: in the header as JSON strings, which YAML reads, in the
    text as code.

    Args:
        inputs: What the run's last attempt began with.
        name: Title of the card.
        pairs: Number of pairs that were trained on.
        loss: The `loss` section.
        hub: What `hub_names` gives.
        training: Settings of the training to show.
        metrics: Held-out metrics by name; timings are left out.
    """
    adapter, dataset = inputs.policy.adapter, inputs.sets["train"].dataset
    header = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "refshard", "preference-optimization"],
        **hub,
    }
    metrics = {key: value for key, value in metrics.items() if not any(word in key for word in _TIMINGS)}
    lines = ["---"]
    lines += [f"{key}: {_quoted(value)}" for key, value in header.items()]
    lines += [
        "---",
        "",
        f"# {_plain(name)}",
        "",
        "Trained with Direct Preference Optimization ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290)) by "
        "refshard, on reference log-probs that were computed once, beforehand.",
        "",
        "| | |",
        "|---|---|",
        f"| policy before training | {_code(inputs.policy.model)} |",
        f"| trained weights | {_code(adapter) if adapter else 'all'} |",
        f"| reference | {_code(inputs.reference.name)} |",
        f"| fingerprint of the reference log-probs | `{inputs.reference.fingerprint}` |",
        f"| data | {_code(dataset)}, {pairs:,} pairs |",
        f"| loss | {_code(_named_loss(loss))}, beta {loss['beta']:g} |",
    ]
    lines += [f"| {_plain(key)} | {_code(value)} |" for key, value in training.items()]
    if metrics:
        lines += ["", "## Held-out pairs", "", "| metric | value |", "|---|---|"]
        lines += [f"| {_code(key)} | {value:.4g} |" for key, value in metrics.items()]
    lines += ["", "## Versions", "", ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in library_versions().items()), ""]
    return "\n".join(lines)


def hub_names(config: Config) -> dict[str, Any]:
    """Name policy and dataset in the header's fields, which take names on the hub alone, no paths."""
    names: dict[str, Any] = {}
    if not Path(config.policy.model).exists():
        names["base_model"] = config.policy.model
    if open_source(config.data).format == "hub":
        names["datasets"] = [config.data.path]
    return names


_TIMINGS = ("runtime", "per_second", "preparation_time")


def _named_loss(loss: Mapping[str, Any]) -> str:
    """Name the losses with their weights, and every option that is not its default."""
    names = loss["type"] if isinstance(loss["type"], list) else [loss["type"]]
    weights = loss.get("weights") or [1] * len(names)
    text = " + ".join(
        name if weight == 1 else f"{weight:g} {name}" for name, weight in zip(names, weights, strict=True)
    )
    plain = {"type", "weights", "beta"}
    options = [f"{key} {value}" for key, value in loss.items() if key not in plain and value != _LOSS_DEFAULTS.get(key)]
    return ", ".join([text, *options])


_LOSS_DEFAULTS = dataclasses.asdict(LossConfig())


def _quoted(value: Any) -> str:
    """Give the value as JSON that is also YAML, which has no surrogate pairs: escape only unprintable characters."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def _plain(value: Any) -> str:
    """Escape text so that it can't end its table cell, start markup, or span lines."""
    text = one_line(str(value))
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return text


def _code(value: Any) -> str:
    text = one_line(str(value)).replace("`", "'")
    # Backslashes before a pipe would escape each other, and the pipe would end the cell.
    text = re.sub(r"\\*\|", lambda _: r"\|", text)
    return f"`{text}`"
