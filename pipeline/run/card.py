"""The model card of a trained policy: its data, its reference, its settings."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.base.errors import one_line
from pipeline.base.versions import library_versions
from pipeline.config.loss import LossConfig
from pipeline.config.schema import Config
from pipeline.data.sources import open_source
from pipeline.run.inputs import RunInputs, SetInputs

__all__ = ["merged_card", "model_card"]

_SETTINGS = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "seed",
)
"""Settings of `train` on the card"""

_TIMINGS = ("runtime", "per_second", "preparation_time")


def model_card(
    config: Config,
    inputs: RunInputs,
    *,
    name: str,
    pairs: int,
    metrics: Mapping[str, float],
    steps: tuple[int, int],
) -> str:
    """Write the card as Markdown with the hub's YAML header.

    Names come from settings and data, so the text quotes them as code.

    Args:
        config: The run's settings.
        inputs: What the run's last attempt began with.
        name: Title of the card.
        pairs: Number of pairs that were trained on.
        metrics: Held-out metrics of the saved weights by name; timings are left out.
        steps: Step of the saved weights, and the run's last one.
    """
    reference = inputs.reference
    how = "on reference log-probs that were computed once, beforehand" if reference else "without a reference"
    scored = (
        (("reference", _code(reference.name)), ("fingerprint of the reference log-probs", f"`{reference.fingerprint}`"))
        if reference
        else ()
    )
    adapter, sets = inputs.policy.adapter, config.data.training
    data = f"{_code(inputs.sets[sets[0]].dataset)}, {pairs:,} pairs"
    if config.data.sets:
        data = f"{pairs:,} pairs of {len(sets)} sets"
    header = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "refshard", "preference-optimization"],
    }
    # The hub takes names of its own in these two fields, no paths.
    if not Path(config.policy.model).exists():
        header["base_model"] = config.policy.model
    on_hub = [source.path for name in sets if (source := open_source(config.data, name)).format == "hub"]
    if on_hub:
        header["datasets"] = list(dict.fromkeys(on_hub))
    options = config.train.options
    metrics = {key: value for key, value in metrics.items() if not any(word in key for word in _TIMINGS)}
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False) + "---",
        "",
        f"# {_plain(name)}",
        "",
        f"Trained {_method(config.loss)} by refshard, {how}.",
        "",
        "| | |",
        "|---|---|",
        f"| policy before training | {_code(inputs.policy.model)} |",
        f"| trained weights | {_code(adapter) if adapter else 'all'} |",
        *([f"| dtype of the weights | {inputs.policy.widened} |"] if inputs.policy.widened else []),
        *(f"| {what} | {text} |" for what, text in scored),
        f"| data | {data} |",
        *(f"| {_plain(name)} | {_set(inputs.sets[name], config.data.fraction(name))} |" for name in config.data.sets),
        f"| weights | of step {steps[0]:,}, of {steps[1]:,} that were trained |",
        f"| loss | {_code(_named_loss(config.loss))}, beta {config.loss.beta:g} |",
    ]
    lines += [f"| {_plain(key)} | {_code(options[key])} |" for key in _SETTINGS if key in options]
    if metrics:
        lines += ["", "## Held-out pairs", "", "| metric | value |", "|---|---|"]
        lines += [f"| {_code(key)} | {value:.4g} |" for key, value in metrics.items()]
    lines += ["", "## Versions", "", ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in library_versions().items()), ""]
    return "\n".join(lines)


def merged_card(card: str, *, base: str, dtype: str, compared: str | None) -> str:
    """Turn the card of a run with an adapter into that of the merged model.

    Args:
        card: The run's card, as it is now; the hub's header may have been changed, or taken out.
        base: Name of the model that the adapter was merged into.
        dtype: Dtype of the merged weights.
        compared: Result of the comparison with the unmerged policy, for people; None if there was none.
    """
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        header = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        header = {}
    header = {**(header if isinstance(header, dict) else {}), "library_name": "transformers"}
    text = card[found.end() :].rstrip() if found else card.rstrip()
    merged = f"The adapter is merged into {_code(base)}, in {dtype}, by `refshard merge`."
    if compared is not None:
        merged += f" Compared with the unmerged policy: {compared}."
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n{text}\n\n## Merged weights\n\n{merged}\n"


def _method(loss: LossConfig) -> str:
    if loss.needs_reference:
        return "with Direct Preference Optimization ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290))"
    papers = {"simpo": "2405.14734", "cpo": "2401.08417", "orpo": "2403.07691"}
    named = (
        f"{name} ([arXiv {papers[name]}](https://arxiv.org/abs/{papers[name]}))"
        for name in loss.types
        if name in papers
    )
    return f"with {' and '.join(named)}"


def _set(inputs: SetInputs, fraction: float) -> str:
    return f"{_code(inputs.dataset)}, fraction {fraction:g}: {inputs.of_epoch or 0:,} pairs an epoch"


def _named_loss(loss: LossConfig) -> str:
    """Name the losses with their weights, and every option that is not its default."""
    weighted = zip(loss.types, loss.weights_of_types, strict=True)
    text = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weighted)
    defaults, plain = dataclasses.asdict(LossConfig()), {"type", "weights", "beta"}
    options = [f"{key} {value}" for key, value in vars(loss).items() if key not in plain and value != defaults[key]]
    return ", ".join([text, *options])


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
