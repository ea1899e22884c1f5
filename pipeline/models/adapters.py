"""Check at the start of a command that adapters fit their models, on models without weights."""

import warnings
from pathlib import Path
from typing import Any

from pipeline.base.errors import ConfigError
from pipeline.base.files import read_file, read_json
from pipeline.base.progress import say
from pipeline.config.schema import Config
from pipeline.models.files import NamedModel, check_base, find_adapter, reference_sources
from pipeline.models.loading import empty_model, loading_errors

__all__ = ["check_adapters"]


def check_adapters(config: Config) -> None:
    """Refuse adapters of policy and reference that do not fit their model. Reads the adapters' weights, and no others.

    Raises:
        ConfigError: A setting names modules that the model lacks, or an adapter has weights of another base.
    """
    policy = NamedModel.policy(config)
    if config.policy.lora is not None or config.policy.ia3 is not None:
        empty_model(policy.text_config(weights=False), config.policy)
    if config.policy.adapter is not None:
        folder = find_adapter(config.policy.adapter, "policy.adapter")
        _check_saved(policy, folder, "policy.adapter")
        if _template_in(folder) not in (None, _template_in(policy.folder(weights=False))):
            say(
                f"warning: policy.adapter: {folder} holds another chat template than policy.model, whose is used and "
                "saved. Put the adapter's into the model's folder if it was trained with that",
                err=True,
            )
    if config.reference.adapter is not None and config.reference.declared is None:
        model, adapter = reference_sources(config)
        if adapter is not None:
            _check_saved(model, adapter, "reference.adapter")


def _check_saved(model: NamedModel, adapter: Path, key: str) -> None:
    import torch
    from peft import PeftConfig, get_peft_model
    from transformers import AutoConfig

    check_base(model, adapter, key)
    with (
        loading_errors(f"{key}: {adapter}", "does not fit the model"),
        torch.device("meta"),
        warnings.catch_warnings(action="ignore"),
    ):
        empty, _ = empty_model(AutoConfig.from_pretrained(model.folder(weights=False), trust_remote_code=False))
        wrapped = get_peft_model(empty, PeftConfig.from_pretrained(str(adapter)))
        # The library raises for weights of another shape. It passes over those that are missing or too many.
        loaded = wrapped.load_adapter(str(adapter), "default", torch_device="cpu")
    for names, found in ((loaded.missing_keys, "it lacks"), (loaded.unexpected_keys, "the model has no place for")):
        if names:
            raise ConfigError(
                f"{key}: must be an adapter of {model.name}, got {adapter}, whose weights are another model's: {found} "
                f"{names[0]} (and {len(names) - 1} more). Name an adapter that was trained on this model"
            )


def _template_in(folder: Path) -> Any:
    """Give the chat template that is saved in a folder, None if there is none."""
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.exists():
        return read_file(file, most=2**24).decode(errors="replace")
    return read_json(settings).get("chat_template") if settings.exists() else None
