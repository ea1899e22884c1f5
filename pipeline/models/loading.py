"""Load tokenizer, reference and policy; attach adapters; switch dropout off.

A model from the hub and its copy on disk are the same model. Weights are read from safetensors only: other formats can
run code when loaded.
"""

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.base.errors import ConfigError, DataError, did_you_mean, is_out_of_memory, one_line
from pipeline.base.files import read_json
from pipeline.config.schema import Config, PolicyConfig, Quantization
from pipeline.models.files import NamedModel, find_adapter, reference_quantization, reference_sources
from pipeline.models.precision import reference_precision, resolve_dtype
from pipeline.models.products import dtype_of_products, products_held_in

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_head",
    "disable_dropout",
    "empty_model",
    "load_base",
    "load_plain",
    "load_policy",
    "load_reference",
    "loading_errors",
    "pick_device",
    "policy_without_weights",
    "with_adapter",
]


def pick_device() -> "torch.device":
    """Give the GPU of this process (`LOCAL_RANK`, as launchers set it), or the CPU if there is no GPU."""
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

    If it is to compute under autocast, the weights of its products are in autocast's dtype, and it runs only so.
    With `precompute.device_map` it is spread over all GPUs that this process sees, and `device` is ignored. With
    `precompute.tp_plan` each process of the launch gets its part of every layer, and all must call this.

    Raises ConfigError if it can't be loaded as the settings demand, DataError if a weight file is damaged.
    """
    import torch

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
    dtype, products = reference_precision(config).weights, dtype_of_products(config)
    with products_held_in(None if products is None else getattr(torch, products)):
        model = _load(named, dtype, device, reference_quantization(config), section, spread)
    if config.precompute.tp_plan is not None:
        _make_head_whole(model)
    if adapter is not None:
        if any(parameter.device.type == "meta" for parameter in model.parameters()):
            raise ConfigError(
                "precompute.device_map: the reference does not fit the GPUs here, and weights that are kept elsewhere "
                "take no adapter; use more GPUs or a narrower reference.dtype, or merge the adapter into the reference"
            )
        model = with_adapter(model, adapter, trainable=False)
    model.requires_grad_(False)
    model.train(False)
    return model


def _split_layers(named: NamedModel, plan: Literal["auto"]) -> Any:
    """Make the library's plan to split a model's layers over the processes of this launch."""
    from transformers.distributed.configuration_utils import DistributedConfig

    model_config = named.text_config()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    otherwise = "use precompute.device_map: auto"
    if not getattr(model_config, "base_model_tp_plan", None):
        raise ConfigError(
            f"precompute.tp_plan: transformers has no plan to split {model_config.model_type}; {otherwise}"
        )
    heads = getattr(model_config, "num_key_value_heads", None) or model_config.num_attention_heads
    if heads % processes:
        raise ConfigError(
            f"precompute.tp_plan: {named.name} has {heads} key and value heads, which {processes} processes can't "
            f"share evenly; start another number of them, or {otherwise}"
        )
    return DistributedConfig(tp_plan=plan)


def _make_head_whole(model: Any) -> None:
    """Give each process the whole output projection instead of its part, since the scorer reads it itself."""
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
    """Load the model to train, with its adapter if the settings have one. The Trainer moves it to its device."""
    policy = config.policy
    model = load_base(config, policy.dtype)
    if policy.adapter is not None:
        return with_adapter(model, find_adapter(policy.adapter, "policy.adapter"), trainable=True)
    return _with_fresh_adapter(model, policy, _adapter_config(policy)) if policy.has_adapter else model


def load_base(config: Config, dtype: str) -> Any:
    """Load the policy's model without an adapter: on the CPU, or on this process's device if it is quantized."""
    # Quantized weights can't be moved once they are loaded.
    device = pick_device() if config.policy.quantization is not None else None
    return _load(NamedModel.policy(config), dtype, device, config.policy.quantization, "policy")


def empty_model(model_config: Any, policy: PolicyConfig | None = None) -> tuple[Any, tuple[int, int] | None]:
    """Make a model of a transformers config without weights, on the meta device: it takes neither memory nor files.

    Returns:
        The plain model; and the number of trained parameters of the policy's adapter, with its rank (0 for IA3).

    Raises ConfigError if the library can't make a causal language model of it, or the adapter does not fit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    library: Any = AutoModelForCausalLM
    with loading_errors("policy.model", "can't be made from its config.json"), torch.device("meta"):
        model = library.from_config(model_config, trust_remote_code=False)
    if policy is None or not policy.has_adapter:
        return model, None
    # The plain model must not change: the caller counts its weights.
    wrapped = policy_without_weights(model_config, policy)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    return model, (trained, int(getattr(wrapped.active_peft_config, "r", 0) or 0))


def policy_without_weights(model_config: Any, policy: PolicyConfig) -> Any:
    """Make the policy of a transformers config on the meta device: `load_policy` without reading weights."""
    import torch

    model, _ = empty_model(model_config)
    model.eval()  # as the library loads it
    disable_dropout(model)
    if not policy.has_adapter:
        return model
    with torch.device("meta"):
        return _with_fresh_adapter(model, policy, _adapter_config(policy))


def load_plain(config: Config) -> Any:
    """Load the reference in float32 on the CPU, its adapter merged into the weights."""
    named, adapter = reference_sources(config)
    model = _load(named, "float32", None, None, "reference")
    return model if adapter is None else with_adapter(model, adapter, trainable=False).merge_and_unload()


def disable_dropout(model: Any) -> None:
    """Switch off every dropout of a plain model: the modules, and the rates that attention reads as numbers.

    Call it before an adapter is attached, since an adapter's own dropout is the user's choice. The model's config is
    unchanged, so the saved policy keeps its rates.
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
    requested: str,
    device: "torch.device | None",
    quantization: Quantization | None,
    section: str,
    spread: Mapping[str, Any] | None = None,
) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    folder, key = named.folder(), named.key
    model_config = read_json(folder / "config.json")
    dtype = resolve_dtype(requested, model_config)
    attention = model_config.get("attn_implementation") or model_config.get("_attn_implementation")
    if attention is not None and "/" in str(attention):
        # Such a name is a repository of compiled code that the library would fetch and run.
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
    with loading_errors(f"{key}: {folder}", "can't be loaded as a causal language model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **placement,
        )
    model, report = loaded
    if report["missing_keys"]:
        # The library would continue with random numbers in their place.
        first = min(report["missing_keys"])
        raise ConfigError(
            f"{key}: {folder}: holds no {first} (of {len(report['missing_keys'])} missing weights), which "
            f"{type(model).__name__} needs; it was saved from another class of model, or not whole"
        )
    for module in model.modules():
        # On a CPU with AVX512-BF16, bitsandbytes packs 4-bit weights in the first evaluation. Training then gets no
        # gradient through them, and DoRA's norms are wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if quantization is None:
        _own_weights(model)
    disable_dropout(model)
    _keep_generation_config(model, folder)
    # An adapter records this as its base; a snapshot's folder in a cache has no meaning elsewhere.
    model.name_or_path = named.name
    return model


def _keep_generation_config(model: Any, folder: Path) -> None:
    """Let a generation config that the library refuses to save be saved as its file came."""
    from transformers import GenerationConfig

    config = getattr(model, "generation_config", None)
    try:
        if config is not None:
            config.validate(strict=True)
    except ValueError:
        file = folder / "generation_config.json"
        content = file.read_bytes() if file.is_file() else None

        class AsItCame(GenerationConfig):
            def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
                target = Path(save_directory) / file.name
                if content is None:  # The library has taken it out of config.json.
                    self.to_json_file(target)
                else:
                    target.write_bytes(content)

        config.__class__ = AsItCame


def _own_weights(model: Any) -> None:
    """Copy the weights on the CPU, which are views of the mapped file.

    They would change with the file, and if it were cut, the process would end by a SIGBUS.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            mapped = tensor.data
            tensor.data = mapped.clone()
            _leave_memory(mapped.data_ptr(), mapped.nbytes)


def _leave_memory(address: int, size: int) -> None:
    """Advise Linux to take pages out of memory that are copied and on the disk, so that no model is held twice."""
    begin, end = (-(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE)
    if sys.platform == "linux" and begin < end:
        pageout = 21  # MADV_PAGEOUT of madvise(2), which loses no content
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), pageout)


def with_adapter(model: Any, adapter: Path, *, trainable: bool) -> Any:
    """Attach a saved adapter to a plain model. Raises ConfigError if it does not fit, DataError if it is damaged."""
    from peft import PeftModel

    with loading_errors(f"adapter {adapter}", "does not fit the model"):
        wrapped = PeftModel.from_pretrained(model, adapter, is_trainable=trainable, use_safetensors=True)
    check_head(wrapped, f"adapter {adapter}")
    return wrapped


def check_head(model: Any, key: str) -> None:
    """Refuse an adapter on the head, whose weight the scorer reads itself. Raises ConfigError."""
    if type(model.get_base_model().get_output_embeddings()).__module__.startswith("peft."):
        raise ConfigError(
            f"{key}: must leave the head alone, got an adapter on it, which the scorer would bypass. Leave lm_head out "
            "of target_modules and modules_to_save"
        )


@contextlib.contextmanager
def loading_errors(place: str, fault: str) -> Iterator[None]:
    """Turn the libraries' errors for damaged weights and unusable models into ours: DataError and ConfigError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise DataError(f"{place}: damaged weight file: {error}") from error
    except Exception as error:  # the library fails anywhere on what it can't use: weights of another shape, ...
        if is_out_of_memory(error):
            raise
        # The first line alone says "Error(s) in loading".
        raise ConfigError(f"{place}: {fault}: {one_line(str(error), most=600)}") from error


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
        # Products run in the dtype of the other weights, as without quantization.
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def _adapter_config(policy: PolicyConfig) -> Any:
    """Make the PEFT config of the policy's adapter, saved or fresh."""
    from peft import IA3Config, LoraConfig, PeftConfig, TaskType

    if policy.adapter is not None:
        saved: Any = PeftConfig.from_pretrained(str(find_adapter(policy.adapter, "policy.adapter")))
        saved.inference_mode = False
        return saved
    if policy.lora is not None:
        lora = policy.lora
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type, unused-ignore]  # a float works, the annotation says int
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            modules_to_save=lora.modules_to_save or None,
            use_rslora=lora.rslora,
            use_dora=lora.dora,
        )
    assert policy.ia3 is not None
    modules, feedforward = policy.ia3.target_modules, policy.ia3.feedforward_modules
    # If only targets are named, all of them scale outputs.
    feedforward = feedforward if modules is None else feedforward or []
    return IA3Config(task_type=TaskType.CAUSAL_LM, target_modules=modules, feedforward_modules=feedforward)


def _with_fresh_adapter(model: Any, policy: PolicyConfig, adapter: Any) -> Any:
    from peft import get_peft_model

    key = next(key for key in ("adapter", "lora", "ia3") if getattr(policy, key) is not None)
    if policy.adapter is None:
        _check_modules(model, getattr(policy, key), f"policy.{key}")
    try:
        wrapped = get_peft_model(model, adapter)
    except ValueError as error:
        raise ConfigError(f"policy.{key}: {one_line(str(error))}") from error
    check_head(wrapped, f"policy.{key}")
    return wrapped


def _check_modules(model: Any, settings: Any, key: str) -> None:
    """Refuse names of modules that the model lacks: the library passes over them if it finds another of the list."""
    modules = [name for name, _ in model.named_modules() if name]
    for setting in ("target_modules", "modules_to_save", "feedforward_modules"):
        named = getattr(settings, setting, None)
        for name in named if isinstance(named, list) else ():
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                hint = did_you_mean(name, sorted({module.rpartition(".")[2] for module in modules}))
                raise ConfigError(
                    f"{key}.{setting}: must name modules of the model, got {name!r}, of which {type(model).__name__} "
                    f"has none. Correct the name, or take it out{hint}"
                )
