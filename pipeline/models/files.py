"""Find the files, settings and dtype of a model, a tokenizer or an adapter; read no weights."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.base.digests import sha256_of_files
from pipeline.base.errors import ConfigError, DataError, first_line
from pipeline.base.files import read_json
from pipeline.config.schema import Config, Dtype, Quantization, ReferenceConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "UNREADABLE",
    "NamedModel",
    "at_checkpoint",
    "declared_reference",
    "find_adapter",
    "find_model",
    "in_one_process",
    "load_tokenizer",
    "model_settings",
    "policy_as_reference",
    "policy_dtype",
    "policy_settings",
    "reference_dtype",
    "reference_quantization",
    "reference_sources",
    "reference_weights",
    "resolve_dtype",
    "text_config",
]

# What the libraries raise for a config.json or weights that they can make nothing of: a size of 0, text for a number,
# weights of another shape, a package that is not there.
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    ImportError,
    AssertionError,
)


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class NamedModel:
    """A model as the settings name it."""

    name: str
    revision: str | None
    key: str
    """The setting that named it, for messages"""

    def folder(self, *, weights: bool = True) -> Path:
        return find_model(self.name, self.revision, self.key, weights=weights)


def policy_as_reference(config: Config, folder: Path) -> Config:
    """Give settings whose reference is the trained policy in a folder: frozen, in the dtype that it computed in.

    Trained weights are kept in float32 beside bf16 products, which writing and scoring have no use for.
    """
    policy = config.policy
    dtype: Any = policy_dtype(config)
    if policy.has_adapter:
        reference = ReferenceConfig(
            model=policy.model,
            revision=policy.revision,
            adapter=str(folder),
            dtype=dtype,
            quantization=policy.quantization,
        )
    else:
        reference = ReferenceConfig(model=str(folder), dtype=dtype)
    return dataclasses.replace(config, reference=reference)


def policy_dtype(config: Config) -> str:
    """Name the dtype that the policy's products run in: autocast's where `train` switches it on."""
    options = config.train.options
    if options.get("bf16") or options.get("fp16"):
        return "bfloat16" if options.get("bf16") else "float16"
    folder = find_model(config.policy.model, config.policy.revision, "policy.model")
    return resolve_dtype(config.policy.dtype, read_json(folder / "config.json"))


def find_model(name: str, revision: str | None, key: str, *, weights: bool = True) -> Path:
    """Give the local folder of a model: the folder itself, or the hub's snapshot, fetched if needed.

    Args:
        name: Folder or hub name.
        revision: Branch, tag or commit on the hub; ignored for a folder.
        key: The setting that named it, for messages.
        weights: Whether they are needed too; false fetches none of them.

    Raises:
        ConfigError: There is no such folder or hub model, or it is no safetensors model.
    """
    patterns = ["*.json", "*.model", "*.txt", "*.jinja"]
    folder = _find(name, revision, key, [*patterns, "*.safetensors"] if weights else patterns)
    if not (folder / "config.json").exists():
        hint = "; it holds an adapter, name that with the key `adapter`" if (folder / ADAPTER_CONFIG).exists() else ""
        raise ConfigError(f"{key}: {name}: no config.json in it, so no model{hint}")
    if not weights:
        return folder
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{key}: {name}: no *.safetensors in it; other weight formats can run code when loaded")
    _check_weight_index(folder / "model.safetensors.index.json", key)
    return folder


def _check_weight_index(index: Path, key: str) -> None:
    """The library loads whatever files the index names; digests are taken of the safetensors in the folder."""
    if not index.exists():
        return
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise DataError(f"{key}: {index}: damaged, it has no weight_map")
    for name in files.values():
        if not (isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name):
            raise ConfigError(f"{key}: {index}: names {name!r}; weights must be safetensors files beside it")


def find_adapter(name: str, key: str) -> Path:
    """Give the local folder of a PEFT adapter. Raises ConfigError as `find_model` does."""
    folder = _find(name, None, key, [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).exists():
            raise ConfigError(f"{key}: {name}: no {file} in it, so no PEFT adapter in safetensors")
    if read_json(folder / ADAPTER_CONFIG).get("megatron_config"):
        # Older versions of the library import whatever module such a config names.
        raise ConfigError(f"{key}: {name}: an adapter of Megatron's layers, which can't be loaded here")
    return folder


def _find(name: str, revision: str | None, key: str, patterns: list[str]) -> Path:
    local = _expanded(name, key)
    if name and local.is_dir():
        return local
    if not name or local.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{key}: {name!r}: no such model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _not_found(name, key, error) from error


def _expanded(name: str, key: str) -> Path:
    try:
        local = Path(name).expanduser()
        local.exists()
    except RuntimeError as error:
        raise ConfigError(f"{key}: {name!r}: there is no such user here to have a home folder") from error
    except OSError as error:
        raise ConfigError(f"{key}: {name!r}: no folder can have such a name ({error.strerror})") from error
    return local


def _not_found(name: str, key: str, error: Exception) -> ConfigError:
    return ConfigError(f"{key}: {name!r} is neither a folder here nor a model the hub gives: {first_line(error)}")


def reference_sources(config: Config) -> tuple[NamedModel, Path | None]:
    """Give the reference's model, and the folder of its adapter if it has one. Fetches no weights.

    Left out in the settings, the reference is the policy before training: its model and, where the policy goes on
    with an adapter, that adapter too, unless `disable_adapters` is set.
    """
    reference, policy = config.reference, config.policy
    if reference.model is not None:
        model = NamedModel(reference.model, reference.revision, "reference.model")
    else:
        model = NamedModel(policy.model, policy.revision, "policy.model")
    if reference.disable_adapters:
        return model, None
    if reference.adapter is not None:
        return model, find_adapter(reference.adapter, "reference.adapter")
    if reference.model is None and policy.adapter is not None:
        return model, find_adapter(policy.adapter, "policy.adapter")
    return model, None


def declared_reference(config: Config) -> dict[str, str | None]:
    """Name the reference and the tokenizer as the settings do: what a manifest records for people."""
    reference, policy = config.reference, config.policy
    own = reference.declared is None and reference.model is None
    adapter = None if reference.declared is not None else reference_sources(config)[1]
    return {
        "reference": reference.declared or reference.model or policy.model,
        "reference_revision": policy.revision if own else reference.revision,
        "reference_adapter": None if adapter is None else reference.adapter or policy.adapter,
        "tokenizer": policy.model,
    }


def reference_weights(model: NamedModel) -> tuple[dict[str, Any], dict[str, str]]:
    """Give a model's config.json and the SHA-256 of each of its weight files, by name.

    A hub model that is not on this machine is not fetched for it: the hub knows the digest of every large file.
    So stage two can tell a changed reference from the scored one without ever having it.
    """
    if not _expanded(model.name, model.key).is_dir() and not _is_cached(model):
        return _weights_on_hub(model)
    folder = model.folder()
    files = [file for file in folder.glob("*.safetensors") if file.name != ADAPTER_WEIGHTS]
    return read_json(folder / "config.json"), sha256_of_files(files)


def _is_cached(model: NamedModel) -> bool:
    """Whether all weight files of a hub model are here already, for the revision that is named."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model.name, revision=model.revision, local_files_only=True))
    except (OSError, ValueError):
        return False
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return all((folder / name).exists() for name in set(read_json(index)["weight_map"].values()))
    return (folder / "model.safetensors").exists()


def _weights_on_hub(model: NamedModel) -> tuple[dict[str, Any], dict[str, str]]:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().model_info(model.name, revision=model.revision, files_metadata=True)
        settings = read_json(Path(hf_hub_download(model.name, "config.json", revision=info.sha)))
    except (OSError, ValueError) as error:
        raise _not_found(model.name, model.key, error) from error
    weights = {
        file.rfilename: file.lfs.sha256
        for file in info.siblings or []
        if file.lfs is not None and file.rfilename.endswith(".safetensors") and "/" not in file.rfilename
    }
    weights.pop(ADAPTER_WEIGHTS, None)
    if not weights:
        raise ConfigError(f"{model.key}: {model.name}: no *.safetensors in it; other formats can run code when loaded")
    return settings, weights


def load_tokenizer(config: Config, *, weights: bool = True) -> "PreTrainedTokenizerBase":
    """Load the policy's tokenizer, which tokenizes for both models in both stages.

    Where `weights` is false, those of a hub model are not fetched along with it.
    """
    from transformers import AutoTokenizer

    folder = find_model(config.policy.model, config.policy.revision, "policy.model", weights=weights)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the Rust library behind it raises nothing more special
        raise ConfigError(
            f"policy.model: {config.policy.model}: its tokenizer can't be loaded: {first_line(error)}"
        ) from error
    return cast("PreTrainedTokenizerBase", tokenizer)


def resolve_dtype(dtype: Dtype, settings: Mapping[str, Any]) -> str:
    """Name the dtype that `auto` stands for: the one in the checkpoint's config.json, float32 where it names none."""
    if dtype != "auto":
        return dtype
    named = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    return str(named).removeprefix("torch.")


def at_checkpoint(config: Config, folder: Path) -> Config:
    """Give the settings with the policy as it is saved in a folder: a checkpoint, or a finished run."""
    policy = config.policy
    if policy.has_adapter:
        policy = dataclasses.replace(policy, adapter=str(folder), lora=None, ia3=None)
    else:
        # FSDP keeps 16-bit weights in float32 where autocast is on, and saves them so.
        policy = dataclasses.replace(policy, model=str(folder), revision=None, dtype="auto")
    return dataclasses.replace(config, policy=policy)


def in_one_process(config: Config) -> Config:
    """Give the settings with which one process loads the reference by itself, however stage one's were to share it.

    It is spread over all GPUs where it has been, or where there are several: it may be larger than one of them.
    """
    import torch

    settings = config.precompute
    shared = settings.tp_plan is not None or settings.device_map is not None or torch.cuda.device_count() > 1
    settings = dataclasses.replace(settings, tp_plan=None, device_map="auto" if shared else None)
    return dataclasses.replace(config, precompute=settings)


def reference_dtype(config: Config) -> Dtype:
    """Name the dtype that the reference is scored in. Fetches no weights."""
    named, _ = reference_sources(config)
    settings = read_json(named.folder(weights=False) / "config.json") if config.reference.dtype == "auto" else {}
    return cast(Dtype, resolve_dtype(config.reference.dtype, settings))


def policy_settings(config: Config) -> Any:
    """Read the policy's config.json as the library does, its text model's part; loads no weights."""
    return text_config(NamedModel(config.policy.model, config.policy.revision, "policy.model"))


def model_settings(config: Config) -> tuple[Any, Any]:
    """Read the config.json of policy and reference, as `policy_settings` does; fetches no weights of hub models."""
    policy = text_config(NamedModel(config.policy.model, config.policy.revision, "policy.model"), weights=False)
    if config.reference.model is None or config.reference.declared is not None:
        return policy, policy
    return policy, text_config(reference_sources(config)[0], weights=False)


def text_config(named: NamedModel, *, weights: bool = True) -> Any:
    from transformers import AutoConfig

    folder = named.folder(weights=weights)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except UNREADABLE as error:
        raise ConfigError(f"{named.key}: {folder}: its config.json can't be read: {first_line(error)}") from error


def reference_quantization(config: Config) -> Quantization | None:
    """Give the reference's quantization: its own, or the policy's where the reference is the policy's own weights."""
    if config.reference.quantization is not None or config.reference.model is not None:
        return config.reference.quantization
    return config.policy.quantization
