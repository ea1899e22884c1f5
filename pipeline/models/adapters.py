"""Check at the start of a command that adapters fit their models, on models without weights."""

import warnings
from pathlib import Path
from typing import Any

from pipeline.base.errors import ConfigError
from pipeline.base.files import read_file, read_json
from pipeline.config.schema import Config
from pipeline.models.files import NamedModel, check_base, find_adapter, reference_sources
from pipeline.models.loading import check_head, empty_model, loading_errors

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
        _check_tokens(policy, folder, "policy.adapter")
    if config.reference.adapter is not None and config.reference.declared is None:
        model, adapter = reference_sources(config)
        if adapter is not None:
            _check_saved(model, adapter, "reference.adapter")
            if model == policy:
                _check_tokens(policy, adapter, "reference.adapter")


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
        check_head(wrapped, f"{key}: {adapter}")
        # The library raises for weights of another shape. It passes over those that are missing or too many.
        loaded = wrapped.load_adapter(str(adapter), "default", torch_device="cpu")
    for names, found in ((loaded.missing_keys, "it lacks"), (loaded.unexpected_keys, "the model has no place for")):
        if names:
            raise ConfigError(
                f"{key}: must be an adapter of {model.name}, got {adapter}, whose weights are another model's: {found} "
                f"{names[0]} (and {len(names) - 1} more). Name an adapter that was trained on this model"
            )


def _check_tokens(model: NamedModel, adapter: Path, key: str) -> None:
    """Refuse an adapter whose folder holds another chat template or vocabulary than the model's, which are used."""
    base = model.folder(weights=False)
    if _template_in(adapter) not in (None, _template_in(base)):
        found = "chat template"
    elif _vocabularies_differ(base, adapter):
        found = "vocabulary"
    else:
        return
    raise ConfigError(
        f"{key}: must be an adapter of {model.name} and its tokenizer, got {adapter}, which holds another {found}. "
        f"Put its tokenizer files into the folder of {model.key}, from which both stages take them, if it was trained "
        "with them; else take them out of the adapter's folder"
    )


def _template_in(folder: Path) -> Any:
    """Give the chat template that is saved in a folder, the default one of several; None if there is none."""
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.exists():
        return read_file(file, most=2**24).decode(errors="replace")
    saved = read_json(settings).get("chat_template") if settings.exists() else None
    named = {one.get("name"): one.get("template") for one in saved} if isinstance(saved, list) else {}
    return named.get("default", saved)


def _vocabularies_differ(base: Path, adapter: Path) -> bool:
    """Return True if both folders hold a vocabulary and they differ in more than the tokens that pad."""
    if not all((folder / "tokenizer.json").exists() for folder in (base, adapter)):
        return False
    saved = [read_json(folder / "tokenizer.json") for folder in (base, adapter)]
    added = [{(token["content"], token["id"]) for token in one.get("added_tokens") or ()} for one in saved]
    padding = {_padding_in(folder) for folder in (base, adapter)}
    vocabularies = [one.get("model", {}).get("vocab") for one in saved]
    return vocabularies[0] != vocabularies[1] or any(word not in padding for word, _ in added[0] ^ added[1])


def _padding_in(folder: Path) -> Any:
    """Give the token that pads by the tokenizer saved in a folder, None if there is none."""
    settings = folder / "tokenizer_config.json"
    token = read_json(settings).get("pad_token") if settings.exists() else None
    return token.get("content") if isinstance(token, dict) else token
