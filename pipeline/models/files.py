"""Find the files and the config of a model, a tokenizer or an adapter; read no weights."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.base.digests import sha256_of_files
from pipeline.base.errors import ConfigError, DataError, RefshardError, first_line, panics_as_errors
from pipeline.base.files import find_special, read_json
from pipeline.config.schema import Config, Quantization, ReferenceConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "WEIGHT_SUFFIXES",
    "NamedModel",
    "at_checkpoint",
    "check_base",
    "declared_reference",
    "files_of_model",
    "find_adapter",
    "in_one_process",
    "load_tokenizer",
    "model_settings",
    "policy_as_reference",
    "reference_quantization",
    "reference_sources",
    "reference_weights",
    "texts_of_model",
]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_MOST_PARTS = 10_000
"""Most layers or experts of a model. They are made as config.json says, before a weight is seen"""
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}


@dataclass(frozen=True)
class NamedModel:
    """A model as the settings name it: a folder, or a hub name with its revision; the setting's key for messages."""

    name: str
    revision: str | None
    key: str

    @classmethod
    def policy(cls, config: Config) -> "NamedModel":
        return cls(config.policy.model, config.policy.revision, "policy.model")

    @property
    def is_on_hub(self) -> bool:
        """True if no folder is named, but a model that the hub may have."""
        name = self.name
        is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
        return bool(name) and not is_path and not _expanded(self).exists()

    def folder(self, *, weights: bool = True) -> Path:
        """Give the local folder, or the hub's snapshot, fetched if needed. Raises ConfigError without such a model."""
        patterns = ["*.json", "*.model", "*.txt", "*.jinja"]
        folder = _find(self, [*patterns, "*.safetensors"] if weights else patterns)
        if not (folder / "config.json").exists():
            is_adapter = (folder / ADAPTER_CONFIG).exists()
            hint = "; it holds an adapter, name that with the key `adapter`" if is_adapter else ""
            raise ConfigError(f"{self.key}: {self.name}: no config.json in it, so no model{hint}")
        _check_counts(read_json(folder / "config.json"), f"{self.key}: {folder}")
        if weights:
            if not any(folder.glob("*.safetensors")):
                raise _no_safetensors(self)
            self._check_files(folder)
        return folder

    def quantization_method(self) -> str | None:
        """Name the method by which the weights in the files are quantized; None if they are plain.

        MXFP4 is none: where the library has no kernels for it, it gives such weights back in 16 bits.
        """
        settings = read_json(self.folder(weights=False) / "config.json").get("quantization_config") or {}
        method = settings.get("quant_method")
        return None if method == "mxfp4" else method

    def _check_files(self, folder: Path) -> None:
        """Refuse what the library would load besides the folder's safetensors, whose digests are taken."""
        if (folder / ADAPTER_CONFIG).exists():
            raise ConfigError(
                f"{self.key}: must be a model without an adapter, got {folder}, which holds config.json and "
                f"{ADAPTER_CONFIG}. Move the adapter to a folder of its own"
            )
        named = read_json(folder / "config.json").get("transformers_weights")
        if named is not None and not (isinstance(named, str) and _is_weight_file(named)):
            raise ConfigError(
                f"{self.key}: {folder}: transformers_weights in its config.json must be a safetensors file beside it, "
                f"got {named!r}. Take it out"
            )
        _check_weight_index(folder / "model.safetensors.index.json", self.key)

    def text_config(self, *, weights: bool = True) -> Any:
        """Read the text model's part of config.json, as the library does. Raises ConfigError as `folder` does."""
        folder = self.folder(weights=weights)
        # A missing folder is refused without the library, which loads for seconds.
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
        except Exception as error:  # the library fails anywhere on what it can't use: a size of 0, text for a number
            raise ConfigError(f"{self.key}: {folder}: its config.json can't be read: {first_line(error)}") from error


def policy_as_reference(config: Config, folder: Path) -> Config:
    """Give settings whose reference is the trained policy in a folder: frozen, computing as it trained."""
    policy = config.policy
    if policy.has_adapter:
        base: dict[str, Any] = {"revision": policy.revision, "quantization": policy.quantization}
        reference = ReferenceConfig(model=policy.model, adapter=str(folder), **base)
    else:
        reference = ReferenceConfig(model=str(folder))
    return dataclasses.replace(config, reference=reference)


def _check_counts(settings: Mapping[str, Any], place: str) -> None:
    """Refuse a config that asks for more layers or experts than any model has, in which a process would end."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            _check_counts(value, place)
        elif type(value) is int and value > _MOST_PARTS and name.endswith(("layer", "layers", "expert", "experts")):
            raise ConfigError(
                f"{place}: {name} in its config.json must be at most {_MOST_PARTS:,}, got {value:,}. Correct it"
            )


def _is_weight_file(name: str) -> bool:
    return name.endswith(".safetensors") and Path(name).name == name


def _check_weight_index(index: Path, key: str) -> None:
    """Refuse an index that does not leave one way to read the folder's safetensors, whose digests are taken."""
    if not index.exists():
        return
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise DataError(f"{key}: {index}: damaged, it has no weight_map")
    for name in files.values():
        if not (isinstance(name, str) and _is_weight_file(name)):
            raise ConfigError(f"{key}: {index}: names {name!r}; weights must be safetensors files beside it")
    if (index.parent / "model.safetensors").exists():
        # The library reads that file and no index.
        return
    found: dict[str, str] = {}
    for file in sorted(index.parent.glob("*.safetensors")):
        for weight in _weights_in(file) & files.keys():
            if weight in found:
                raise ConfigError(
                    f"{key}: {index.parent}: must hold each weight once, got {weight} in {found[weight]} and in "
                    f"{file.name}. Remove the file that is not used"
                )
            found[weight] = file.name


def _weights_in(file: Path) -> set[str]:
    """Give the names of the weights in a file; none if it is damaged, which loading reports."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError):
        return set()


def files_of_model(folder: Path, adapter: Path | None = None) -> list[Path]:
    """List the files that a model and its adapter are loaded from."""
    files = [file for pattern in ("config.json", "*.index.json", "*.safetensors") for file in folder.glob(pattern)]
    return sorted(files) + ([] if adapter is None else [adapter / ADAPTER_CONFIG, adapter / ADAPTER_WEIGHTS])


def texts_of_model(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the files that settings, tokenizer and chat templates are read from, and those of further templates."""
    places = (folder, folder / "additional_chat_templates")
    top, further = ([file for file in sorted(place.glob("*")) if file.is_file()] for place in places)
    return [file for file in top if file.suffix not in WEIGHT_SUFFIXES], further


def find_adapter(name: str, key: str) -> Path:
    """Give the local folder of a PEFT adapter. Raises ConfigError if there is none."""
    folder = _find(NamedModel(name, None, key), [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).exists():
            raise ConfigError(f"{key}: {name}: no {file} in it, so no PEFT adapter in safetensors")
    settings = read_json(folder / ADAPTER_CONFIG)
    if settings.get("megatron_config"):
        # Older versions of the library import any module that such a config names.
        raise ConfigError(f"{key}: {name}: an adapter of Megatron's layers, which can't be loaded here")
    kind = str(settings.get("peft_type"))
    if "PROMPT" in kind or kind in ("P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"):
        raise ConfigError(
            f"{key}: must be an adapter that changes layers, like LoRA, got {kind} in {name}: prompt learning puts "
            "tokens of its own before each text, which packed rows do not have. Name another adapter"
        )
    return folder


def check_base(model: NamedModel, adapter: Path, key: str) -> None:
    """Refuse an adapter that was trained on other weights than the model's. Says nothing if they are not here."""
    base = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or base == model.name:
        return
    try:
        named = NamedModel(base, None, key)
        weights = reference_weights(named)[1] if _expanded(named).is_dir() or _is_cached(named) else None
    except RefshardError:
        return
    if weights is not None and weights != reference_weights(model)[1]:
        raise ConfigError(
            f"{key}: must be an adapter of {model.name}, got {adapter}, which was trained on {base}: its weights are "
            f"others. Name that model, or, if both are the same, correct base_model_name_or_path in {ADAPTER_CONFIG}"
        )


def _find(model: NamedModel, patterns: list[str]) -> Path:
    name, local = model.name, _expanded(model)
    if name and local.is_dir():
        for folder in (local, local / "additional_chat_templates"):
            if (found := find_special(folder)) is not None:
                raise ConfigError(f"{model.key}: {name}: must hold regular files, got {found}. Take it out")
        return local
    if not model.is_on_hub:
        raise ConfigError(f"{model.key}: {name!r}: no such model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=model.revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _not_on_hub(model, error) from error


def _expanded(model: NamedModel) -> Path:
    try:
        local = Path(model.name).expanduser()
        local.exists()
    except (RuntimeError, OSError) as error:
        # A home folder of no user here; a name that is too long.
        raise ConfigError(f"{model.key}: {model.name!r}: not a folder's name ({first_line(error)})") from error
    return local


def _not_on_hub(model: NamedModel, error: Exception) -> ConfigError:
    place = f"{model.key}: {model.name!r}"
    return ConfigError(f"{place} is neither a folder here nor a model on the hub: {first_line(error)}")


def _no_safetensors(model: NamedModel) -> ConfigError:
    where = f"{model.key}: {model.name}"
    return ConfigError(f"{where}: no *.safetensors in it; other weight formats can run code when loaded")


def reference_sources(config: Config) -> tuple[NamedModel, Path | None]:
    """Give the reference's model, and the folder of its adapter if it has one. Fetches no weights.

    If the settings name no reference, it is the policy before training, with its adapter unless `disable_adapters`.
    """
    reference, policy = config.reference, config.policy
    if reference.model is not None:
        model = NamedModel(reference.model, reference.revision, "reference.model")
    else:
        model = NamedModel.policy(config)
    if reference.disable_adapters:
        return model, None
    if reference.adapter is not None:
        return model, find_adapter(reference.adapter, "reference.adapter")
    if reference.model is None and policy.adapter is not None:
        return model, find_adapter(policy.adapter, "policy.adapter")
    return model, None


def declared_reference(config: Config) -> dict[str, str | None]:
    """Name the reference and the tokenizer as the settings do, for people who read the manifest."""
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

    A hub model that is not on this machine is not fetched: the hub knows the digest of every large file. So stage two
    can distinguish a changed reference from the scored one without its weights.
    """
    if not _expanded(model).is_dir() and not _is_cached(model):
        return _weights_on_hub(model)
    folder = model.folder()
    files = [file for file in folder.glob("*.safetensors") if file.name != ADAPTER_WEIGHTS]
    return read_json(folder / "config.json"), sha256_of_files(files)


def _is_cached(model: NamedModel) -> bool:
    """Return True if all weight files of a hub model are on this machine, for the named revision."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model.name, revision=model.revision, local_files_only=True))
    except (OSError, ValueError):
        return False
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = read_json(index).get("weight_map")
        # `NamedModel.folder` refuses a damaged index.
        return not isinstance(files, dict) or all((folder / str(name)).exists() for name in files.values())
    return (folder / "model.safetensors").exists()


def _weights_on_hub(model: NamedModel) -> tuple[dict[str, Any], dict[str, str]]:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().model_info(model.name, revision=model.revision, files_metadata=True)
        file = Path(hf_hub_download(model.name, "config.json", revision=info.sha))
    except Exception as error:  # the errors of the hub's client have no common type
        raise _not_on_hub(model, error) from error
    weights = {
        file.rfilename: file.lfs.sha256
        for file in info.siblings or []
        if file.lfs is not None and file.rfilename.endswith(".safetensors") and "/" not in file.rfilename
    }
    weights.pop(ADAPTER_WEIGHTS, None)
    if not weights:
        raise _no_safetensors(model)
    return read_json(file), weights


def load_tokenizer(config: Config, *, weights: bool = True) -> "PreTrainedTokenizerBase":
    """Load the policy's tokenizer, which tokenizes for both models; fetch a hub model's `weights` with it."""
    folder = NamedModel.policy(config).folder(weights=weights)
    # A missing folder is refused without the library, which loads for seconds.
    from transformers import AutoTokenizer

    try:
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the Rust library behind it raises no narrower class
        raise ConfigError(
            f"policy.model: {config.policy.model}: its tokenizer can't be loaded: {first_line(error)}"
        ) from error
    return cast("PreTrainedTokenizerBase", tokenizer)


def at_checkpoint(config: Config, folder: Path) -> Config:
    """Give settings whose policy is the one saved in a folder: a checkpoint, or a finished run."""
    policy = config.policy
    if policy.has_adapter:
        policy = dataclasses.replace(policy, adapter=str(folder), lora=None, ia3=None)
    else:
        # Under autocast FSDP keeps 16-bit weights in float32, and saves them so.
        policy = dataclasses.replace(policy, model=str(folder), revision=None, dtype="auto")
    return dataclasses.replace(config, policy=policy)


def in_one_process(config: Config) -> Config:
    """Give settings with which one process loads the whole reference, spread over all GPUs if it was or can be."""
    import torch

    before = config.precompute
    spread = before.tp_plan is not None or before.device_map is not None or torch.cuda.device_count() > 1
    precompute = dataclasses.replace(before, tp_plan=None, device_map="auto" if spread else None)
    return dataclasses.replace(config, precompute=precompute)


def model_settings(config: Config) -> tuple[Any, Any]:
    """Read the config.json of policy and reference, as `text_config` does; fetches no weights of hub models."""
    policy = NamedModel.policy(config).text_config(weights=False)
    if config.reference.model is None or config.reference.declared is not None:
        return policy, policy
    return policy, reference_sources(config)[0].text_config(weights=False)


def reference_quantization(config: Config) -> Quantization | None:
    """Give the reference's quantization: its own, or the policy's if the reference is the policy's own weights."""
    if config.reference.quantization is not None or config.reference.model is not None:
        return config.reference.quantization
    return config.policy.quantization
