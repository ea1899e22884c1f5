"""Load tokenizer, reference and policy; attach adapters; switch dropout off.

A model is named by a folder or a hub name. Either way it is brought to a local folder first (`find_model`), and
everything after works on that folder, so a model from the hub and its copy on disk are the same model. Weights
are read from safetensors only: other formats can run code when they are loaded.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.config import Config, Dtype, LoraSettings
from pipeline.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "disable_dropout",
    "find_adapter",
    "find_model",
    "load_policy",
    "load_reference",
    "load_tokenizer",
    "pick_device",
    "reference_sources",
    "resolve_dtype",
]


def find_model(name: str, revision: str | None, key: str) -> Path:
    """Give the local folder of a model: the folder itself, or the hub's snapshot, fetched if needed.

    Args:
        name: Folder or hub name.
        revision: Branch, tag or commit on the hub; ignored for a folder.
        key: The setting that named it, for messages.

    Raises:
        ConfigError: There is no such folder or hub model, or it is no safetensors model.
    """
    folder = _find(name, revision, key, ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    if not (folder / "config.json").exists():
        hint = "; it holds an adapter, name that with the key `adapter`" if (folder / _ADAPTER).exists() else ""
        raise ConfigError(f"{key}: {name}: no config.json in it, so no model{hint}")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{key}: {name}: no *.safetensors in it; other weight formats can run code when loaded")
    return folder


def find_adapter(name: str, key: str) -> Path:
    """Give the local folder of a PEFT adapter. Raises ConfigError as `find_model` does."""
    folder = _find(name, None, key, ["adapter_config.json", "adapter_model.safetensors"])
    for file in (_ADAPTER, "adapter_model.safetensors"):
        if not (folder / file).exists():
            raise ConfigError(f"{key}: {name}: no {file} in it, so no PEFT adapter in safetensors")
    return folder


_ADAPTER = "adapter_config.json"


def _find(name: str, revision: str | None, key: str, patterns: list[str]) -> Path:
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    if not name or local.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{key}: {name!r}: no such model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{key}: {name!r} is neither a folder here nor a model the hub gives: {reason}") from error


def reference_sources(config: Config) -> tuple[Path, Path | None]:
    """Give the folders of the reference's weights and of its adapter, if it has one.

    Left out in the settings, the reference is the policy before training: its model and, where the policy goes on
    with an adapter, that adapter too, unless `disable_adapters` is set.
    """
    reference, policy = config.reference, config.policy
    if reference.model is not None:
        folder = find_model(reference.model, reference.revision, "reference.model")
    else:
        folder = find_model(policy.model, policy.revision, "policy.model")
    if reference.disable_adapters:
        return folder, None
    if reference.adapter is not None:
        return folder, find_adapter(reference.adapter, "reference.adapter")
    if reference.model is None and policy.adapter is not None:
        return folder, find_adapter(policy.adapter, "policy.adapter")
    return folder, None


def load_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """Load the policy's tokenizer, which tokenizes for both models in both stages."""
    from transformers import AutoTokenizer

    folder = find_model(config.policy.model, config.policy.revision, "policy.model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"policy.model: {config.policy.model}: its tokenizer can't be loaded: {error}") from error
    return cast("PreTrainedTokenizerBase", tokenizer)


def resolve_dtype(dtype: Dtype, folder: Path) -> str:
    """Name the dtype that `auto` stands for: the one in the checkpoint's config.json, float32 where it names none."""
    if dtype != "auto":
        return dtype
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = content.get("dtype") or content.get("torch_dtype") or "float32"
    return str(named).removeprefix("torch.")


def pick_device() -> "torch.device":
    """The GPU of this process where there is one (`LOCAL_RANK`, as launchers set it), else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def load_reference(config: Config, device: "torch.device") -> Any:
    """Load the frozen reference for stage one: eval mode, no gradients, dropout off."""
    folder, adapter = reference_sources(config)
    key = "reference.model" if config.reference.model else "policy.model"
    name = config.reference.model or config.policy.model
    model = _load(folder, name, resolve_dtype(config.reference.dtype, folder), key, device)
    if adapter is not None:
        model = _with_adapter(model, adapter, trainable=False)
    model.requires_grad_(False)
    model.train(False)
    return model


def load_policy(config: Config) -> Any:
    """Load the model to train, with its adapter where the settings have one. The Trainer moves it to its device."""
    folder = find_model(config.policy.model, config.policy.revision, "policy.model")
    model = _load(folder, config.policy.model, resolve_dtype(config.policy.dtype, folder), "policy.model", None)
    if config.policy.adapter is not None:
        return _with_adapter(model, find_adapter(config.policy.adapter, "policy.adapter"), trainable=True)
    if config.policy.lora is not None:
        return _with_fresh_lora(model, config.policy.lora)
    return model


def disable_dropout(model: Any) -> None:
    """Switch off every dropout of a plain model: the modules, and the rates that attention reads as numbers.

    To be called before an adapter is attached, whose own dropout is the user's choice. The model's config is not
    touched, so the saved policy keeps the rates it came with.
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _load(folder: Path, name: str, dtype: str, key: str, device: "torch.device | None") -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise ConfigError(f"{key}: {folder}: dtype {dtype} can't be scored with; set dtype to bfloat16 or float32")
    placement = {"device_map": {"": device}} if device is not None and device.type != "cpu" else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False, **placement
        )
    except SafetensorError as error:
        raise DataError(f"{key}: {folder}: damaged weight file: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{key}: {folder}: can't be loaded as a causal language model: {reason}") from error
    disable_dropout(model)
    # An adapter records this as its base; a snapshot's folder in a cache would mean nothing elsewhere.
    model.name_or_path = name
    return model


def _with_adapter(model: Any, adapter: Path, *, trainable: bool) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter, is_trainable=trainable, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"adapter {adapter}: does not fit the model: {reason}") from error


def _with_fresh_lora(model: Any, settings: LoraSettings) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type, unused-ignore]  # a float works, the annotation says int
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"policy.lora.target_modules: {error}") from error
