"""Load tokenizer, reference and policy; attach adapters; switch dropout off.

A model is named by a folder or a hub name. Either way it is brought to a local folder first (`find_model`), and
everything after works on that folder, so a model from the hub and its copy on disk are the same model. Weights
are read from safetensors only: other formats can run code when they are loaded.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pipeline.config import Config, Dtype, Ia3Settings, LoraSettings, PolicyConfig, Quantization
from pipeline.digests import sha256_of_files
from pipeline.errors import ConfigError, DataError
from pipeline.storage import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "NamedModel",
    "at_checkpoint",
    "declared_reference",
    "disable_dropout",
    "empty_model",
    "find_adapter",
    "find_model",
    "in_one_process",
    "load_plain",
    "load_policy",
    "load_reference",
    "load_tokenizer",
    "model_settings",
    "pick_device",
    "policy_settings",
    "reference_dtype",
    "reference_quantization",
    "reference_sources",
    "reference_weights",
    "resolve_dtype",
]

# What the libraries raise for a config.json or weights that they can make nothing of: a size of 0, text for a number,
# weights of another shape, a package that is not there.
_UNUSABLE = (
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
    return ConfigError(f"{key}: {name!r} is neither a folder here nor a model the hub gives: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class NamedModel:
    """A model as the settings name it."""

    name: str
    revision: str | None
    key: str
    """The setting that named it, for messages"""

    def folder(self, *, weights: bool = True) -> Path:
        return find_model(self.name, self.revision, self.key, weights=weights)


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
            f"policy.model: {config.policy.model}: its tokenizer can't be loaded: {_first_line(error)}"
        ) from error
    return cast("PreTrainedTokenizerBase", tokenizer)


def resolve_dtype(dtype: Dtype, settings: Mapping[str, Any]) -> str:
    """Name the dtype that `auto` stands for: the one in the checkpoint's config.json, float32 where it names none."""
    if dtype != "auto":
        return dtype
    named = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    return str(named).removeprefix("torch.")


def pick_device() -> "torch.device":
    """The GPU of this process where there is one (`LOCAL_RANK`, as launchers set it), else the CPU."""
    import torch

    if torch.cuda.is_available():
        number = int(os.environ.get("LOCAL_RANK", "0"))
        if number >= torch.cuda.device_count():
            raise ConfigError(
                f"this machine shows {torch.cuda.device_count()} GPUs, and process {number} of it, counted from 0, has "
                "none; start as many processes as there are GPUs"
            )
        return torch.device("cuda", number)
    return torch.device("cpu")


def load_reference(config: Config, device: "torch.device") -> Any:
    """Load the frozen reference for stage one: eval mode, no gradients, dropout off.

    With `precompute.device_map` it is spread over the GPUs that this process sees, whatever `device` says. With
    `precompute.tp_plan` each process of the launch gets its part of every layer, and all must call this.

    Raises:
        ConfigError: It can't be loaded, or not in the way that the settings ask for.
        DataError: A weight file is damaged.
    """
    named, adapter = reference_sources(config)
    section = "policy" if config.reference.quantization is None else "reference"
    spread: dict[str, Any] = {}
    if config.precompute.device_map is not None:
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "precompute.device_map: each of several processes would spread the reference over all GPUs; start one, "
                "or use precompute.tp_plan: auto"
            )
        spread["device_map"] = config.precompute.device_map
    if config.precompute.tp_plan is not None:
        spread["distributed_config"] = _split_layers(named, config.precompute.tp_plan)
    model = _load(named, config.reference.dtype, device, reference_quantization(config), section, spread)
    if config.precompute.tp_plan is not None:
        _make_head_whole(model)
    if adapter is not None:
        if any(parameter.device.type == "meta" for parameter in model.parameters()):
            raise ConfigError(
                "precompute.device_map: the reference does not fit the GPUs here, and weights that are kept elsewhere "
                "take no adapter; use more GPUs or a narrower reference.dtype, or merge the adapter into the reference"
            )
        model = _with_adapter(model, adapter, trainable=False)
    model.requires_grad_(False)
    model.train(False)
    return model


def _split_layers(named: NamedModel, plan: Literal["auto"]) -> Any:
    """Say how the library is to split a model's layers over the processes of this launch."""
    from transformers.distributed.configuration_utils import DistributedConfig

    settings = _text_settings(named)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    otherwise = "use precompute.device_map: auto"
    if not getattr(settings, "base_model_tp_plan", None):
        raise ConfigError(f"precompute.tp_plan: transformers has no plan to split {settings.model_type}; {otherwise}")
    heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
    if heads % processes:
        raise ConfigError(
            f"precompute.tp_plan: {named.name} has {heads} key and value heads, which {processes} processes can't "
            f"share evenly; start another number of them, or {otherwise}"
        )
    return DistributedConfig(tp_plan=plan)


def _make_head_whole(model: Any) -> None:
    """Give each process the whole output projection, which the scorer reads itself, in place of its part."""
    import torch
    from torch.distributed.tensor import DTensor

    head = model.get_output_embeddings()

    def whole(tensor: torch.Tensor | None) -> torch.nn.Parameter | None:
        if tensor is None:
            return None
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return torch.nn.Parameter(full.detach(), requires_grad=False)

    weight, bias = whole(head.weight), whole(getattr(head, "bias", None))
    assert weight is not None
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight, plain.bias = weight, bias  # type: ignore[assignment]
    model.set_output_embeddings(plain)


def load_policy(config: Config) -> Any:
    """Load the model to train, with its adapter where the settings have one. The Trainer moves it to its device."""
    policy = config.policy
    named = NamedModel(policy.model, policy.revision, "policy.model")
    # Quantized weights can't be moved after they are loaded.
    device = pick_device() if policy.quantization is not None else None
    model = _load(named, policy.dtype, device, policy.quantization, "policy")
    if policy.adapter is not None:
        return _with_adapter(model, find_adapter(policy.adapter, "policy.adapter"), trainable=True)
    if policy.lora is not None:
        return _with_fresh_adapter(model, _lora_config(policy.lora), "policy.lora")
    if policy.ia3 is not None:
        return _with_fresh_adapter(model, _ia3_config(policy.ia3), "policy.ia3")
    return model


def empty_model(settings: Any, policy: PolicyConfig | None = None) -> tuple[Any, tuple[int, int] | None]:
    """Make a model without weights, on the meta device, which takes neither memory nor files.

    Args:
        settings: Its transformers config.
        policy: Says which adapter is trained on it.

    Returns:
        The plain model; and, of its adapter, the number of trained parameters and its rank (0 for IA3).

    Raises:
        ConfigError: The library makes no causal language model of it, or the adapter does not fit.
    """
    import torch

    try:
        with torch.device("meta"):
            model = _from_config(settings)
    except _UNUSABLE as error:
        raise ConfigError(f"policy.model: can't be made from its config.json: {_first_line(error)}") from error
    if policy is None or not policy.has_adapter:
        return model, None
    if policy.adapter is not None:
        from peft import PeftConfig

        adapter: Any = PeftConfig.from_pretrained(str(find_adapter(policy.adapter, "policy.adapter")))
        adapter.inference_mode = False
    else:
        adapter = _lora_config(policy.lora) if policy.lora is not None else _ia3_config(policy.ia3 or Ia3Settings())
    # The plain model is not to be changed: it is what the weights are counted in.
    with torch.device("meta"):
        wrapped = _with_fresh_adapter(_from_config(settings), adapter, "policy")
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    return model, (trained, int(getattr(adapter, "r", 0) or 0))


def _from_config(settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    library: Any = AutoModelForCausalLM
    return library.from_config(settings, trust_remote_code=False)


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


def load_plain(config: Config) -> Any:
    """Load the reference in float32 on the CPU, its adapter merged into the weights."""
    named, adapter = reference_sources(config)
    model = _load(named, "float32", None, None, "reference")
    return model if adapter is None else _with_adapter(model, adapter, trainable=False).merge_and_unload()


def reference_dtype(config: Config) -> Dtype:
    """Name the dtype that the reference is scored in. Fetches no weights."""
    named, _ = reference_sources(config)
    settings = read_json(named.folder(weights=False) / "config.json") if config.reference.dtype == "auto" else {}
    return cast(Dtype, resolve_dtype(config.reference.dtype, settings))


def policy_settings(config: Config) -> Any:
    """Read the policy's config.json as the library does, its text model's part; loads no weights."""
    return _text_settings(NamedModel(config.policy.model, config.policy.revision, "policy.model"))


def model_settings(config: Config) -> tuple[Any, Any]:
    """Read the config.json of policy and reference, as `policy_settings` does; fetches no weights of hub models."""
    policy = _text_settings(NamedModel(config.policy.model, config.policy.revision, "policy.model"), weights=False)
    if config.reference.model is None or config.reference.declared is not None:
        return policy, policy
    return policy, _text_settings(reference_sources(config)[0], weights=False)


def _text_settings(named: NamedModel, *, weights: bool = True) -> Any:
    from transformers import AutoConfig

    folder = named.folder(weights=weights)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except _UNUSABLE as error:
        raise ConfigError(f"{named.key}: {folder}: its config.json can't be read: {_first_line(error)}") from error


def reference_quantization(config: Config) -> Quantization | None:
    """Give the reference's quantization: its own, or the policy's where the reference is the policy's own weights."""
    if config.reference.quantization is not None or config.reference.model is not None:
        return config.reference.quantization
    return config.policy.quantization


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


def _load(
    named: NamedModel,
    requested: Dtype,
    device: "torch.device | None",
    quantization: Quantization | None,
    section: str,
    spread: Mapping[str, Any] | None = None,
) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    folder, key = named.folder(), named.key
    settings = read_json(folder / "config.json")
    dtype = resolve_dtype(requested, settings)
    attention = settings.get("attn_implementation") or settings.get("_attn_implementation")
    if attention is not None and "/" in str(attention):
        # Such a name is a repository of compiled code, which the library would fetch and run.
        raise ConfigError(
            f"{key}: {folder}: its config.json asks for attention from the hub, {attention!r}; take it out"
        )
    if dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise ConfigError(f"{key}: {folder}: dtype {dtype} can't be scored with; set dtype to bfloat16 or float32")
    placement: dict[str, Any] = dict(spread or {})
    if not spread and device is not None and device.type != "cpu":
        placement["device_map"] = {"": device}
    if quantization is not None:
        placement["quantization_config"] = _bitsandbytes(quantization, dtype, section)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **placement,
        )
    except SafetensorError as error:
        raise DataError(f"{key}: {folder}: damaged weight file: {error}") from error
    except torch.OutOfMemoryError:
        raise
    except _UNUSABLE as error:
        raise ConfigError(
            f"{key}: {folder}: can't be loaded as a causal language model: {_first_line(error)}"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        # The library would go on with random numbers in their place.
        first = min(report["missing_keys"])
        raise ConfigError(
            f"{key}: {folder}: holds no {first} (of {len(report['missing_keys'])} missing weights), which "
            f"{type(model).__name__} needs; it was saved from another class of model, or not whole"
        )
    for module in model.modules():
        # On a CPU with AVX512-BF16, bitsandbytes packs 4-bit weights in the first evaluation; from then on training
        # gets no gradient through them, and DoRA's norms are those of other weights.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    disable_dropout(model)
    # An adapter records this as its base; a snapshot's folder in a cache would mean nothing elsewhere.
    model.name_or_path = named.name
    return model


def _with_adapter(model: Any, adapter: Path, *, trainable: bool) -> Any:
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        return PeftModel.from_pretrained(model, adapter, is_trainable=trainable, use_safetensors=True)
    except SafetensorError as error:
        raise DataError(f"{adapter}: damaged weight file: {error}") from error
    except torch.OutOfMemoryError:
        raise
    except _UNUSABLE as error:
        raise ConfigError(f"adapter {adapter}: does not fit the model: {_first_line(error)}") from error


def _bitsandbytes(settings: Quantization, dtype: str, section: str) -> Any:
    import importlib.util

    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{section}.quantization: needs bitsandbytes, which is not installed here. "
            "Run: pip install 'refshard[quantization]'"
        )
    if settings.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.type,
        bnb_4bit_use_double_quant=settings.double,
        # Products run in the dtype of the weights that are not quantized, as they would without quantization.
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def _lora_config(settings: LoraSettings) -> Any:
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type, unused-ignore]  # a float works, the annotation says int
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        modules_to_save=settings.modules_to_save or None,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
    )


def _ia3_config(settings: Ia3Settings) -> Any:
    from peft import IA3Config, TaskType

    modules = settings.target_modules
    # Named targets without named feed-forward ones: all of them scale outputs.
    feedforward = settings.feedforward_modules if modules is None else settings.feedforward_modules or []
    return IA3Config(task_type=TaskType.CAUSAL_LM, target_modules=modules, feedforward_modules=feedforward)


def _with_fresh_adapter(model: Any, adapter: Any, key: str) -> Any:
    from peft import get_peft_model

    try:
        return get_peft_model(model, adapter)
    except ValueError as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error
