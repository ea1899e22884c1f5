"""The settings of a run: one frozen dataclass per section, and the combinations that each of them refuses."""

import math
from dataclasses import dataclass, field
from typing import Literal

from pipeline.base.errors import did_you_mean
from pipeline.config.cluster import ClusterConfig
from pipeline.config.convert import FALSE_WORDS
from pipeline.config.training import TrainSection

__all__ = [
    "Config",
    "DataConfig",
    "EvalSetConfig",
    "Ia3Settings",
    "LoraSettings",
    "LossConfig",
    "LossName",
    "PolicyConfig",
    "PrecomputeConfig",
    "Quantization",
    "ReferenceConfig",
    "SyncConfig",
]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class EvalSetConfig:
    """One held-out set. What is left out is taken from `data`."""

    path: str | None = None
    """File, folder or hub name; `data.path` if left out."""
    name: str | None = None
    """Configuration of a hub dataset; `data.name` if left out."""
    split: str | None = None
    """Split, with an optional range of rows: `test`, `train[2000:]`; `data.split` if left out."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pairs, and how they become tokens."""

    path: str
    """A JSON Lines (.gz too), Parquet or CSV file, a folder of them, a `save_to_disk` folder, or a hub name."""
    name: str | None = None
    """Configuration (subset) of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    split: str = "train"
    """Split, with an optional range of rows: `train`, `train[:2000]`, `train[2000:4000]`."""
    format: Literal["jsonl", "parquet", "csv", "disk", "hub"] | None = None
    """Read from the path's ending if left out."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames, ours to theirs: `{prompt: question, chosen: answer_good}`. In place of `prompt`, `user`, with `system`
    where there is such a column, makes a conversation of texts: `{system: system, user: question}`."""
    max_length: int | None = 1024
    """Tokens of prompt and completion together; the end is cut. Null: no cut."""
    streaming: bool = False
    """Stream a hub dataset instead of downloading it. Local files are always streamed by stage one."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What a row that can't be a pair does: stop the run, or be skipped, counted and listed."""
    on_identical: Literal["keep", "drop"] = "keep"
    """Pairs whose chosen and rejected are equal: their loss is a constant; they are counted either way."""
    eval: dict[str, EvalSetConfig] = field(default_factory=dict)
    """Held-out sets by name. Each has a store of its own beside `train`, under the same rules."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError("max_length: at least 2 tokens, one of the prompt and one of the completion")
        for set_name in self.eval:
            if set_name in ("train", "costs") or not set_name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(
                    f"eval.{set_name}: a set's name is a folder's name: letters, digits, - and _, not 'train' or "
                    "'costs'"
                )
        for ours in self.columns:
            if ours not in (*PAIR_COLUMNS, *SPOKEN_COLUMNS):
                known = (*PAIR_COLUMNS, *SPOKEN_COLUMNS)
                raise ValueError(f"columns.{ours}: no such column of a pair{did_you_mean(ours, known)}")
        if "user" in self.columns and "prompt" in self.columns:
            raise ValueError("columns.user: set together with prompt; user makes a conversation of it, prompt does not")
        if "system" in self.columns and "user" not in self.columns:
            raise ValueError("columns.system: goes with user, the column of what the user says, in place of prompt")


PAIR_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")


SPOKEN_COLUMNS = ("system", "user")
"""Texts that become the messages of the prompt; read only where `data.columns` names them."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Weights in few bits, through bitsandbytes (`pip install refshard[quantization]`)."""

    bits: Literal[4, 8]
    """4: QLoRA's (arXiv 2305.14314); 8: LLM.int8() (arXiv 2208.07339)."""
    type: Literal["nf4", "fp4"] = "nf4"
    """Data type of 4-bit weights."""
    double: bool = False
    """Quantize the 4-bit blocks' scales too, which saves 0.4 bits a weight."""

    def __post_init__(self) -> None:
        if self.bits == 8 and (self.type != "nf4" or self.double):
            raise ValueError("type: type and double are of 4-bit weights")


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """TR-DPO (arXiv 2404.09656): every `steps` steps the reference moves toward the policy."""

    steps: int = 512
    """Optimizer steps between two moves: one window."""
    mixup_alpha: float = 0.6
    """New reference = mixup_alpha * policy + (1 - mixup_alpha) * reference. 1 copies the policy, 0 moves nothing."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("steps: at least 1")
        if not 0 <= self.mixup_alpha <= 1:
            raise ValueError("mixup_alpha: from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen model that stage one scores with. Left out: the policy as it is before training."""

    model: str | None = None
    """Folder or hub name of any causal language model that shares the policy's vocabulary."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    adapter: str | None = None
    """Folder or hub name of a PEFT adapter that belongs to the reference."""
    disable_adapters: bool = False
    """With a policy that continues an adapter: the reference is the plain base model, not base and adapter."""
    dtype: Dtype = "auto"
    """Dtype of the weights; `auto` is the checkpoint's own."""
    quantization: Quantization | None = None
    """Load the weights in 4 or 8 bits. Left out with `model`, the reference is quantized as the policy is."""
    declared: str | None = None
    """A reference that can't be loaded here, known by this name alone; its log-probs come from `refshard import`."""
    sync: SyncConfig | None = None
    """Let the reference follow the policy (TR-DPO)."""

    def __post_init__(self) -> None:
        if self.disable_adapters and self.adapter is not None:
            raise ValueError("adapter: set together with disable_adapters: true; keep one of the two")
        if self.declared is not None:
            for key in ("model", "revision", "adapter", "disable_adapters", "dtype", "quantization", "sync"):
                if getattr(self, key) not in (None, False, "auto"):
                    raise ValueError(f"{key}: set together with declared, a reference that is never loaded")
        if self.sync is not None and self.quantization is not None:
            raise ValueError("quantization: a reference that moves (sync) is kept in float32; leave one of the two out")


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Stage one."""

    output: str
    """Folder of the stores: `output/train` and one for each held-out set."""
    reuse: list[str] = field(default_factory=list)
    """Stores of the same reference and tokenization to copy from, by key: `[runs/a/shards/train, ...]`."""
    rows_per_shard: int = 1024
    """Dataset rows of one unit, one Parquet file: what is lost at most when a worker is killed."""
    tokens_per_batch: int | None = None
    """Most tokens of one forward pass. Left out: as many as the device's free memory takes."""
    token_logps: bool = True
    """Store a log-prob for each token too: it lets a run with a smaller `max_length` use the same shards."""
    on_nonfinite: Literal["stop", "drop"] = "stop"
    """What a pair with a NaN or infinite log-prob does: stop the run, or be dropped and counted."""
    device_map: Literal["auto"] | None = None
    """`auto`: a reference larger than one GPU; its layers are spread over all that one process sees."""
    tp_plan: Literal["auto"] | None = None
    """`auto`: a reference larger than one GPU; each layer is split over all processes of the launch."""

    def __post_init__(self) -> None:
        if self.rows_per_shard < 1:
            raise ValueError("rows_per_shard: at least 1")
        if self.tokens_per_batch is not None and self.tokens_per_batch < 1:
            raise ValueError("tokens_per_batch: at least 1")
        if self.device_map is not None and self.tp_plan is not None:
            raise ValueError("tp_plan: set together with device_map; keep one of the two")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A fresh LoRA adapter on the policy (arXiv 2106.09685)."""

    r: int = 16
    """Rank."""
    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapter's input, in training only."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get an adapter, or `all-linear`: every linear layer but the head."""
    modules_to_save: list[str] = field(default_factory=list)
    """Names of modules that are trained whole beside the adapter, and saved with it: `[embed_tokens, norm]`."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Train magnitude and direction apart (DoRA, arXiv 2402.09353)."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError("r: at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError("alpha: above 0 and finite; at 0 the adapter changes nothing")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout: from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class Ia3Settings:
    """A fresh IA3 adapter on the policy: learned factors on activations (arXiv 2205.05638)."""

    target_modules: list[str] | None = None
    """Names of the layers that get factors; the library's choice for the architecture if left out."""
    feedforward_modules: list[str] | None = None
    """Those of them whose input is scaled, not their output."""

    def __post_init__(self) -> None:
        if self.feedforward_modules is not None and self.target_modules is None:
            raise ValueError("feedforward_modules: name target_modules too")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The model in training. Its folder also gives the tokenizer and the chat template, in both stages."""

    model: str
    """Folder or hub name of a causal language model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    adapter: str | None = None
    """Folder or hub name of a PEFT adapter to go on training."""
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
        """Whether an adapter is trained, fresh or continued, and not the weights themselves."""
        return self.adapter is not None or self.lora is not None or self.ia3 is not None

    def __post_init__(self) -> None:
        named = [key for key in ("adapter", "lora", "ia3") if getattr(self, key) is not None]
        if len(named) > 1:
            raise ValueError(f"{named[1]}: set together with {named[0]}; a run trains one adapter")
        if self.quantization is not None and not named:
            raise ValueError("quantization: quantized weights can't be trained themselves; set lora, ia3 or adapter")


LossName = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]


# Which losses take which option. Setting one that no named loss takes is refused, never ignored.
_WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")


_WITH_SMOOTHING = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective. Names and defaults are those of TRL's DPOConfig."""

    type: list[LossName] | LossName = "sigmoid"
    """One loss or a list of them; `sigmoid` is DPO (arXiv 2305.18290, eq. 7)."""
    weights: list[float] | None = None
    """One weight for each loss of a list; 1 each if left out."""
    beta: float = 0.1
    """Pull toward the reference, per nat; the paper's tau for `ipo`."""
    label_smoothing: float = 0.0
    """Share of labels taken to be flipped: conservative DPO for `sigmoid`, the epsilon of `robust`, `exo_pair`, ..."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """The divergence that ties the policy to the reference (arXiv 2309.16240)."""
    f_alpha_divergence_coef: float = 0.5
    """The alpha of `alpha_divergence`."""
    ld_alpha: float | None = None
    """Weight of tokens past the shorter completion's length, in both models (LD-DPO, arXiv 2409.06411); 0 to 1."""
    use_weighting: bool = False
    """Weigh pairs by how likely the policy is to write them (WPO, arXiv 2406.11827)."""
    discopop_tau: float = 0.05
    """Temperature of `discopop`."""
    router_aux_loss_coef: float | None = None
    """Weight of a mixture-of-experts model's balance loss; the model's own if left out, 0 for none."""

    @property
    def types(self) -> list[LossName]:
        """The losses as a list."""
        return self.type if isinstance(self.type, list) else [self.type]

    @property
    def weights_of_types(self) -> list[float]:
        """One weight for each of `types`."""
        return self.weights if self.weights is not None else [1.0] * len(self.types)

    def __post_init__(self) -> None:
        if not self.types:
            raise ValueError("type: name at least one loss")
        if len(set(self.types)) < len(self.types):
            raise ValueError("type: a loss is there twice; give it one weight instead")
        if self.weights is not None and len(self.weights) != len(self.types):
            raise ValueError(f"weights: {len(self.weights)} for {len(self.types)} losses; one for each is needed")
        if self.weights is not None and not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError("weights: finite numbers")
        if not 0 < self.beta < math.inf:
            raise ValueError("beta: above 0 and finite; at 0 the loss does not see what the policy does")
        if not 0 <= self.label_smoothing <= 0.5:
            raise ValueError("label_smoothing: from 0 to 0.5; above it the labels would be more wrong than right")
        if self.label_smoothing > 0 and not set(self.types) & set(_WITH_SMOOTHING):
            raise ValueError(
                f"label_smoothing: none of the losses takes it; those that do: {', '.join(_WITH_SMOOTHING)}"
            )
        if "robust" in self.types and self.label_smoothing == 0.5:
            raise ValueError("label_smoothing: below 0.5 for robust, which divides by 1 - 2 label_smoothing")
        if "exo_pair" in self.types and self.label_smoothing == 0:
            raise ValueError("label_smoothing: above 0 for exo_pair, which takes its logarithm; 1e-3 is usual")
        without = [name for name in self.types if name not in _WITH_DIVERGENCE]
        if self.f_divergence_type != "reverse_kl" and without:
            raise ValueError(f"f_divergence_type: {', '.join(without)} is defined for reverse_kl alone")
        if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
            raise ValueError("f_alpha_divergence_coef: set without f_divergence_type: alpha_divergence")
        if not math.isfinite(self.f_alpha_divergence_coef):
            raise ValueError("f_alpha_divergence_coef: a finite number")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError("ld_alpha: from 0, the common length alone, to 1, plain sums")
        if self.use_weighting and {"aot", "aot_unpaired"} & set(self.types):
            raise ValueError("use_weighting: aot sorts pairs, so that no value belongs to a pair that could be weighed")
        if not 0 < self.discopop_tau < math.inf:
            raise ValueError("discopop_tau: above 0 and finite")
        if self.discopop_tau != 0.05 and "discopop" not in self.types:
            raise ValueError("discopop_tau: set without discopop among the losses")
        if self.router_aux_loss_coef is not None and not 0 <= self.router_aux_loss_coef < math.inf:
            raise ValueError("router_aux_loss_coef: 0 or above, and finite")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One YAML file: both stages read it."""

    data: DataConfig
    policy: PolicyConfig
    precompute: PrecomputeConfig
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    train: TrainSection = field(default_factory=TrainSection)

    def __post_init__(self) -> None:
        if self.loss.ld_alpha is not None and not self.precompute.token_logps:
            raise ValueError("loss.ld_alpha: needs token logps in the shards (precompute.token_logps: true)")
        if self.precompute.tp_plan is not None:
            _check_tensor_parallel(self)
        if self.reference.sync is not None:
            _check_sync(self)


def _check_tensor_parallel(config: "Config") -> None:
    """Refuse what can't go together with a reference whose layers are split over processes."""
    reference, own = config.reference, config.reference.model is None
    if reference.quantization is not None or (own and config.policy.quantization is not None):
        raise ValueError("precompute.tp_plan: quantized weights can't be split; use precompute.device_map: auto")
    if reference.adapter is not None or (own and config.policy.adapter is not None and not reference.disable_adapters):
        raise ValueError(
            "precompute.tp_plan: an adapter's weights are not split with the layers that it is on; merge it into the "
            "reference, or use precompute.device_map: auto"
        )
    if reference.sync is not None:
        raise ValueError("precompute.tp_plan: a reference that moves (reference.sync) is scored by one process")


def _check_sync(config: "Config") -> None:
    """Refuse what can't go together with a reference that moves."""
    if config.policy.quantization is not None:
        raise ValueError("policy.quantization: quantized weights can't be mixed with the reference (reference.sync)")
    if config.cluster.train.nodes * config.cluster.train.processes > 1:
        raise ValueError("cluster.train.processes: a reference that moves (reference.sync) is trained by one process")
    if config.train.on_missing == "drop":
        raise ValueError("train.on_missing: drop would change which pairs a window has (reference.sync)")
    for key in ("load_best_model_at_end", "push_to_hub"):
        if str(config.train.given.get(key, "false")).lower() not in FALSE_WORDS:
            raise ValueError(f"train.{key}: can't be set with reference.sync, whose run is one process for each window")
