"""The settings of a run: one frozen dataclass for each section, with the values that it refuses."""

import math
from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.cluster import ClusterConfig
from pipeline.config.convert import FALSE_WORDS, PathText, refuse_both, require, require_at_least
from pipeline.config.data import DataConfig
from pipeline.config.loss import WITHOUT_MARGIN, WITHOUT_WEIGHT, LossConfig
from pipeline.config.training import TrainSection

__all__ = [
    "Config",
    "Ia3Settings",
    "LoraSettings",
    "PolicyConfig",
    "PrecomputeConfig",
    "Quantization",
    "ReferenceConfig",
    "SyncConfig",
]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Weights in 4 or 8 bits, with bitsandbytes (`pip install refshard[quantization]`)."""

    bits: Literal[4, 8]
    """Bits of a weight: 4 as in QLoRA (arXiv 2305.14314), or 8 as in LLM.int8() (arXiv 2208.07339)."""
    type: Literal["nf4", "fp4"] = "nf4"
    """Data type of 4-bit weights."""
    double: bool = False
    """Quantize the scales of the 4-bit blocks too. This saves 0.4 bits a weight."""

    def __post_init__(self) -> None:
        if self.bits == 8 and (self.type != "nf4" or self.double):
            raise ValueError("bits: must be 4 with type or double, got 8. Leave type and double out")


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """TR-DPO (arXiv 2404.09656): every `steps` steps the reference moves toward the policy."""

    steps: int = 512
    """Number of optimizer steps between two moves of the reference: one window."""
    mixup_alpha: float = 0.6
    """New reference = mixup_alpha * policy + (1 - mixup_alpha) * reference. 1 copies the policy, 0 moves nothing."""

    def __post_init__(self) -> None:
        require_at_least(self, steps=1)
        require(0 <= self.mixup_alpha <= 1, "mixup_alpha", "from 0 to 1", self.mixup_alpha)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen model that stage one scores with; if left out, the policy before training."""

    model: str | None = None
    """Folder or hub name of a causal language model with the policy's vocabulary; if left out, the policy before
    training."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    adapter: str | None = None
    """Folder or hub name of the reference's PEFT adapter."""
    disable_adapters: bool = False
    """If `policy.adapter` is set: score with its base model alone."""
    dtype: Dtype = "auto"
    """Dtype of the weights; `auto` computes as the policy will, in its dtype and under its autocast."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """Dtype of autocast; if left out, that of `train.bf16` or `fp16` if `dtype` is `auto`, and none otherwise."""
    quantization: Quantization | None = None
    """Load the weights in 4 or 8 bits; if this and `model` are left out, as the policy."""
    declared: str | None = None
    """Name of a reference that can't be loaded here; its log-probs come from `refshard import`."""
    sync: SyncConfig | None = None
    """Let the reference follow the policy (TR-DPO)."""

    def __post_init__(self) -> None:
        refuse_both("adapter", "disable_adapters", self.disable_adapters and self.adapter is not None)
        if self.declared is not None:
            loaded = ("model", "revision", "adapter", "disable_adapters", "dtype", "autocast", "quantization", "sync")
            for key in loaded:
                refuse_both(key, "declared", getattr(self, key) not in (None, False, "auto"))
        # A reference that moves is kept in float32.
        refuse_both("quantization", "sync", self.sync is not None and self.quantization is not None)


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Stage one: where the shards go, and how they are made."""

    output: PathText
    """Folder of the stores: `output/train`, or one for each of `data.sets`, and one for each held-out set."""
    reuse: list[PathText] = field(default_factory=list)
    """Stores of the same reference and tokenization, or folders of them, to copy log-probs from: `[runs/a/shards]`."""
    rows_per_shard: int = 1024
    """Number of dataset rows of one unit (one Parquet file). A killed or stopped worker loses at most one unit."""
    tokens_per_batch: int | None = None
    """Largest number of tokens of one forward pass; if left out, as many as fit in a GPU's free memory, or 2,048 on a
    CPU."""
    token_logps: bool = True
    """Store a log-prob for each token too. A smaller `data.max_length` and `loss.ld_alpha` need them."""
    on_nonfinite: Literal["stop", "drop"] = "stop"
    """Stop at a pair with a NaN or infinite log-prob, or drop and count it."""
    device_map: Literal["auto"] | None = None
    """`auto`: spread the layers of a reference larger than one GPU over all GPUs of the process."""
    tp_plan: Literal["auto"] | None = None
    """`auto`: split each layer of a reference larger than one GPU over all processes of the launch."""

    def __post_init__(self) -> None:
        require_at_least(self, rows_per_shard=1, tokens_per_batch=1)
        refuse_both("tp_plan", "device_map", self.device_map is not None and self.tp_plan is not None)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A fresh LoRA adapter on the policy (arXiv 2106.09685)."""

    r: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout probability on the adapter's input, in training only."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers with an adapter, or `all-linear`: every linear layer except the head."""
    modules_to_save: list[str] = field(default_factory=list)
    """Names of modules that are trained whole and saved with the adapter: `[embed_tokens, norm]`."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Train magnitude and direction separately (DoRA, arXiv 2402.09353)."""

    def __post_init__(self) -> None:
        require_at_least(self, r=1)
        require(0 < self.alpha < math.inf, "alpha", "a positive finite number", self.alpha)
        require(0 <= self.dropout < 1, "dropout", "from 0 to below 1", self.dropout)


@dataclass(frozen=True, kw_only=True)
class Ia3Settings:
    """A fresh IA3 adapter on the policy: learned factors on activations (arXiv 2205.05638)."""

    target_modules: list[str] | None = None
    """Names of the layers with factors; if left out, PEFT's choice for the architecture."""
    feedforward_modules: list[str] | None = None
    """Names of those of `target_modules` whose input is scaled instead of their output."""

    def __post_init__(self) -> None:
        if self.feedforward_modules is not None and self.target_modules is None:
            raise ValueError("feedforward_modules: must be set together with target_modules. Name target_modules too")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The model in training. Both stages take tokenizer and chat template from its folder."""

    model: str
    """Folder or hub name of a causal language model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    adapter: str | None = None
    """Folder or hub name of a PEFT adapter to continue."""
    lora: LoraSettings | None = None
    """Train a fresh LoRA adapter instead of all weights."""
    ia3: Ia3Settings | None = None
    """Train a fresh IA3 adapter instead of all weights."""
    dtype: Dtype = "float32"
    """Dtype of the weights; for mixed precision keep float32 and set `train.bf16: true`."""
    quantization: Quantization | None = None
    """Load the weights in 4 or 8 bits and train an adapter on them (QLoRA)."""

    @property
    def has_adapter(self) -> bool:
        """True if an adapter is trained, fresh or continued, instead of the weights."""
        return self.adapter is not None or self.lora is not None or self.ia3 is not None

    def __post_init__(self) -> None:
        named = [key for key in ("adapter", "lora", "ia3") if getattr(self, key) is not None]
        if len(named) > 1:
            refuse_both(named[1], named[0], True)
        if self.quantization is not None and not named:
            raise ValueError(
                "quantization: must be set together with an adapter, since quantized weights can't be trained. Set "
                "lora, ia3 or adapter"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of both stages, from one YAML file."""

    data: DataConfig
    policy: PolicyConfig
    precompute: PrecomputeConfig
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    train: TrainSection = field(default_factory=TrainSection)

    def __post_init__(self) -> None:
        if self.loss.ld_alpha is not None and not self.precompute.token_logps:
            raise ValueError(
                f"loss.ld_alpha: must be left out without token log-probs in the shards, got {self.loss.ld_alpha}. Set "
                "precompute.token_logps: true"
            )
        named = {column for name in self.data.names for column in self.data.of(name).columns}
        for column, kinds, why in (
            ("weight", WITHOUT_WEIGHT, "compares the pairs of a micro-batch"),
            ("margin", WITHOUT_MARGIN, "has no logit that a margin could shift"),
        ):
            if column in named and (losses := [name for name in self.loss.types if name in kinds]):
                raise ValueError(f"data.columns.{column}: must be left out for {', '.join(losses)}, which {why}")
        if self.precompute.tp_plan is not None:
            _check_tensor_parallel(self)
        if self.reference.sync is not None:
            _check_sync(self)


def _check_tensor_parallel(config: "Config") -> None:
    """Refuse settings that contradict a reference whose layers are split over processes."""
    reference, own = config.reference, config.reference.model is None
    if reference.quantization is not None or (own and config.policy.quantization is not None):
        raise ValueError(
            "precompute.tp_plan: must be left out with quantized weights, which can't be split. Set "
            "precompute.device_map: auto"
        )
    if reference.adapter is not None or (own and config.policy.adapter is not None and not reference.disable_adapters):
        raise ValueError(
            "precompute.tp_plan: must be left out with an adapter, whose weights are not split with its layers. Merge "
            "it into the reference, or set precompute.device_map: auto"
        )
    refuse_both("precompute.tp_plan", "reference.sync", reference.sync is not None)


def _check_sync(config: "Config") -> None:
    """Refuse settings that contradict a reference that moves."""
    if not config.loss.needs_reference:
        raise ValueError(f"reference.sync: must be left out for {', '.join(config.loss.types)}, without a reference")
    if config.data.sets:
        # A window is scored in one store, by its rows' place in the order of training.
        raise ValueError(
            "data.sets: must be left out if reference.sync is set. Write the pairs to one file, and name it "
            "in data.path"
        )
    # Pairs of weight 0 are left out, which a window's place in the order does not know.
    refuse_both("data.columns.weight", "reference.sync", "weight" in config.data.columns)
    refuse_both("policy.quantization", "reference.sync", config.policy.quantization is not None)
    processes = config.cluster.train.nodes * config.cluster.train.processes
    require(processes == 1, "cluster.train.processes", "1 with reference.sync, on one node", processes)
    # Dropped pairs would change which pairs a window has, and weights that are not finite are not saved.
    for key in ("on_missing", "on_nonfinite"):
        choice = getattr(config.train, key)
        require(choice == "stop", f"train.{key}", "stop with reference.sync", choice)
    # Such a run is a process for each window.
    for key in ("load_best_model_at_end", "push_to_hub"):
        if str(config.train.given.get(key, "false")).lower() not in FALSE_WORDS:
            refuse_both(f"train.{key}", "reference.sync", True)
