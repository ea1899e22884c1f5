"""A run's settings: frozen dataclasses, read from one YAML file, with `-o key=value` on top.

Every scalar is converted by the type that its field declares, never by YAML's guess: `5e-7` is a float
though YAML reads a string, `off` stays a word where a word is wanted. An unknown key is refused with the
nearest right one. Importing this module loads neither torch nor transformers.
"""

import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from pipeline.errors import ConfigError

__all__ = [
    "OWN_TRAIN_FIELDS",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EvalSetConfig",
    "Ia3Settings",
    "JobConfig",
    "KubernetesConfig",
    "LoraSettings",
    "LossConfig",
    "LossName",
    "PolicyConfig",
    "PrecomputeConfig",
    "Quantization",
    "ReferenceConfig",
    "SyncConfig",
    "as_dict",
    "load_config",
    "settings_text",
    "training_settings",
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
                raise ValueError(f"columns.{ours}: no such column of a pair{_nearest(ours, known)}")
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
class JobConfig:
    """What one job asks its scheduler for."""

    nodes: int = 1
    """Machines that stage two trains on together; a worker of stage one has one."""
    processes: int = 1
    """Processes on each machine: for stage two one for each GPU; for stage one with `precompute.tp_plan` as well."""
    gpus: int | None = None
    """GPUs on each machine; as many as processes if left out, 0 for none."""
    cpus: int | None = None
    """CPU cores of each process; the scheduler's default if left out."""
    memory: str | None = None
    """Memory on each machine: `200G`, which is 200 GiB for either scheduler; a number alone is in MiB."""
    time: str | None = None
    """Time limit: `90` minutes, `4:00:00`, `2-00:00:00`. What is not done by then is put in the queue again."""

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("processes", 1), ("gpus", 0), ("cpus", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: at least {least}")
        if self.memory is not None and not re.fullmatch(r"[0-9]+([KMGT]i?)?", self.memory):
            raise ValueError(f"memory: expected a size like 200G, found {self.memory!r}")
        if self.time is not None and not _TIME_LIMIT.fullmatch(self.time):
            raise ValueError(f"time: expected minutes, hours:minutes:seconds or days-hours, found {self.time!r}")

    @property
    def gpus_of_node(self) -> int:
        """GPUs on each machine."""
        return self.processes if self.gpus is None else self.gpus


# As sbatch reads it: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds].
_TIME_LIMIT = re.compile(r"[0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}")


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig:
    """What Kubernetes needs to be told on top."""

    image: str | None = None
    """Container image with refshard in it."""
    namespace: str | None = None
    """Namespace; that of the current context if left out."""
    claim: str | None = None
    """A persistent volume claim that is there, which may hold data and models; one is rendered if left out."""
    size: str = "100Gi"
    """Size of the claim that is rendered."""
    storage_class: str | None = None
    """Its storage class, which must allow ReadWriteMany; the cluster's default if left out."""
    mount: str = "/data"
    """Where the volume is mounted, and where the settings' relative paths start."""
    secret: str | None = None
    """A secret whose entries become environment variables: HF_TOKEN, AWS_ACCESS_KEY_ID, ..."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that may run the pods."""

    def __post_init__(self) -> None:
        for name in ("namespace", "claim", "storage_class", "secret"):
            value = getattr(self, name)
            if value is not None and not _DNS_NAME.fullmatch(value):
                raise ValueError(f"{name}: {value!r} is no Kubernetes name: lower-case letters, digits, - and .")
        if not re.fullmatch(r"[0-9]+[KMGTPE]i?", self.size):
            raise ValueError(f"size: expected a size like 100Gi, found {self.size!r}")
        if not self.mount.startswith("/") or ":" in self.mount:
            raise ValueError(f"mount: expected an absolute path without a colon, found {self.mount!r}")


_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The job files that `refshard submit` makes; neither stage reads it."""

    workers: int = 1
    """Workers of stage one: tasks of the Slurm array, indexes of the Kubernetes Job."""
    precompute: JobConfig = field(default_factory=JobConfig)
    """One worker of stage one."""
    train: JobConfig = field(default_factory=JobConfig)
    """Stage two."""
    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Slurm account."""
    options: list[str] = field(default_factory=list)
    """More options of sbatch, for every job: `[--qos=high, --constraint=a100]`."""
    setup: str | None = None
    """Shell lines that come before the program in a Slurm job: `module load cuda`, `source env/bin/activate`."""
    container: str | None = None
    """What the program is run through in a Slurm job: `apptainer exec --nv refshard.sif`."""
    grace: int = 120
    """Seconds between the warning and the end: for a batch, or a step, and a save. Slurm warns up to 60 s earlier."""
    restarts: int = 100
    """How often the same job is put in the queue again, or a pod started again, before it counts as failed."""
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    """What Kubernetes needs on top."""

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("grace", 1), ("restarts", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: at least {least}")
        for name in ("partition", "account"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,@+-]+", value, re.ASCII):
                raise ValueError(f"{name}: {value!r} has characters that no such name has")
        for i, option in enumerate(self.options):
            if not re.fullmatch(r"--?[a-zA-Z][^\n\r]*", option):
                raise ValueError(f"options[{i}]: expected an option of sbatch in one line, like --qos=high")
        if self.precompute.nodes > 1:
            raise ValueError("precompute.nodes: a worker of stage one has one machine; set workers for more of them")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One YAML file: both stages read it."""

    data: DataConfig
    policy: PolicyConfig
    precompute: PrecomputeConfig
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    train: dict[str, object] = field(default_factory=dict)
    """Any field of `transformers.TrainingArguments`; `on_missing`, stop or drop: what pairs do that have no reference
    logps; `on_mismatch`, stop or warn: what a policy does that should start as its reference and does not."""

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
    if str(config.train.get("on_missing", "stop")) == "drop":
        raise ValueError("train.on_missing: drop would change which pairs a window has (reference.sync)")
    for key in ("load_best_model_at_end", "push_to_hub"):
        if str(config.train.get(key, "false")).lower() not in _FALSE:
            raise ValueError(f"train.{key}: can't be set with reference.sync, whose run is one process for each window")


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a run's settings from YAML and put `key=value` overrides (`loss.beta=0.2`) on top.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown or twice there, a value has the wrong
            type or is impossible. The message names the key.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(_LARGEST_CONFIG + 1)
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: can't be read ({_reason(error)})") from error
    if len(content) > _LARGEST_CONFIG:
        raise ConfigError(f"--config {path}: larger than {_LARGEST_CONFIG:,} bytes; is it the right file?")
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections like `data:` and `policy:` at the top, found {_kind(tree)}")
    for override in overrides:
        _apply_override(tree, override)
    _refuse_passwords(tree, "")
    return _expand_home(typing.cast(Config, _build(Config, tree, "")))


_LARGEST_CONFIG = 2**20
_MOST_VALUES = 100_000


def _refuse_passwords(value: Any, where: str) -> None:
    """Settings are saved beside shards and policy, and shown in messages: no place for what opens an account."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_passwords(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_passwords(item, f"{where}[{i}]")
    elif isinstance(value, str) and re.search(r"://[^/?#\s]*@", value):
        # The value is not shown, since the message goes to a log.
        raise ConfigError(
            f"{where}: holds a user name or password; take it out, and give it by the environment (HF_TOKEN, "
            "AWS_ACCESS_KEY_ID, ...)"
        )


def _expand_home(config: Config) -> Config:
    """Read `~` in the paths of data and shards, as model folders and the library's own paths do."""
    data, precompute = config.data, config.precompute
    sets = {
        name: dataclasses.replace(held_out, path=held_out.path and _from_home(held_out.path))
        for name, held_out in data.eval.items()
    }
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, path=_from_home(data.path), eval=sets),
        precompute=dataclasses.replace(
            precompute,
            output=_from_home(precompute.output),
            reuse=[_from_home(store) for store in precompute.reuse],
        ),
    )


def _from_home(path: str) -> str:
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise ConfigError(f"{path}: there is no such user here to have a home folder") from error


def as_dict(config: Config) -> dict[str, Any]:
    """The settings as plain dicts, lists and scalars, defaults filled in: what is saved beside a run."""
    return dataclasses.asdict(config)


def settings_text(config: Config) -> str:
    """The settings as a YAML file that `load_config` reads, defaults filled in. Access tokens are left out."""
    settings = as_dict(config)
    settings["train"] = {key: value for key, value in settings["train"].items() if not key.endswith("_token")}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def training_settings(config: Config) -> dict[str, Any]:
    """Check the `train` section against `transformers.TrainingArguments` and convert its values.

    Our defaults differ from the library's where DPO needs it: learning_rate 1e-6 (DPO's usual order for full
    fine-tuning), logging every 10 steps, no experiment tracker unless named, and six hours for processes to wait for
    the one that joins the data, which takes longer than the library's half an hour for millions of pairs.

    Raises:
        ConfigError: An unknown field, a wrong type, or a field that refshard itself must set.
    """
    # Imported here: the module pulls torch, and settings are read by commands that answer without it.
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    settings: dict[str, Any] = {
        "learning_rate": 1e-6,
        "logging_steps": 10,
        "report_to": "none",
        "ddp_timeout": 6 * 3600,
    }
    for key, value in config.train.items():
        where = f"train.{key}"
        if key in OWN_TRAIN_FIELDS:
            settings[key] = _convert(value, OWN_TRAIN_FIELDS[key], where)
            continue
        if key not in known:
            raise ConfigError(
                f"{where}: no such field of TrainingArguments{_nearest(key, [*sorted(known), *OWN_TRAIN_FIELDS])}"
            )
        if key in _FIXED_TRAIN_FIELDS:
            raise ConfigError(f"{where}: {_FIXED_TRAIN_FIELDS[key]}")
        settings[key] = _convert(value, hints.get(key, Any), where)
    if not settings.get("output_dir"):
        raise ConfigError("train.output_dir: missing; name the folder that the trained policy goes to")
    return settings


# What pairs without reference logps do, what a policy does that is not the reference that it should start as, and
# whether what backward needs of forward waits for it in the CPU's memory.
OWN_TRAIN_FIELDS = {
    "on_missing": Literal["stop", "drop"],
    "on_mismatch": Literal["stop", "warn"],
    "activation_offload": bool,
}

_FIXED_TRAIN_FIELDS = {
    "remove_unused_columns": "can't be set: the join's columns are always needed",
    "label_names": "can't be set: preference pairs have no labels",
    "resume_from_checkpoint": "can't be set: a rerun goes on from the last whole checkpoint by itself",
    "save_only_model": "can't be set: a run that goes on from a checkpoint without its optimizer is another run",
    "ignore_data_skip": "can't be set: a run that goes on must go on with the pairs that it has not seen",
    "enable_jit_checkpoint": "can't be set: signals are handled by refshard, which saves and exits with 75",
    "do_train": "can't be set: `refshard train` trains",
    "do_predict": "can't be set: there is nothing to predict",
    "label_smoothing_factor": "can't be set: it belongs to cross-entropy, not to DPO",
    "use_liger_kernel": "can't be set: refshard scores through its own head",
    "auto_find_batch_size": "can't be set: it would change the batches between two runs of one configuration",
    "include_num_input_tokens_seen": "can't be set: num_tokens counts them, and is always logged",
    "neftune_noise_alpha": "can't be set: noise on the policy's embeddings would be scored against a reference without",
}


class _Loader(yaml.BaseLoader):
    """Leaves every scalar a string, refuses a key that is there twice, and tags of types that YAML does not have."""


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value in node.value:
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise yaml.YAMLError(f"line {line}: a key must be a word")
        if key in result:
            raise yaml.YAMLError(f"line {line}: key {key!r} is there twice")
        result[key] = loader.construct_object(value, deep=True)
    return result


def _refuse_tag(loader: _Loader, node: yaml.Node) -> Any:
    raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the tag {node.tag!r} is of no type that a setting has")


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> Any:
    return loader.construct_sequence(node, deep=True)


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    return loader.construct_scalar(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)
for _name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _scalar)
_Loader.add_constructor(None, _refuse_tag)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        tree = yaml.load(text, Loader=_Loader)
    # An impossible escape like "\\Uffffffff" is a ValueError of Python's.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML: {_reason(error)}") from error
    _check_size(tree, where)
    return tree


def _check_size(tree: Any, where: str) -> None:
    """Refuse what a few aliases in a small file can stand for: billions of values, if each is looked at."""
    left, values = [tree], 0
    while left:
        item = left.pop()
        values += 1
        if values > _MOST_VALUES:
            raise ConfigError(f"{where}: stands for more than {_MOST_VALUES:,} values; are its aliases meant?")
        if isinstance(item, str) and "\0" in item:
            raise ConfigError(f"{where}: holds a NUL character, which no setting may")
        left += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"-o {override}: expected key=value, like loss.beta=0.2")
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None or (isinstance(child, str) and child in _NULLS):
            child = {}
        if not isinstance(child, dict):
            raise ConfigError(f"-o {override}: {section} holds a value, not settings")
        node[section] = child
        node = child
    value = _parse_yaml(text, f"-o {override}")
    # An empty document is YAML's None, an empty value in a file the empty string: one meaning, one form.
    node[last] = "" if value is None else value


_NULLS = ("", "null", "Null", "NULL", "~")
_TRUE = ("true", "yes", "on")
_FALSE = ("false", "no", "off")


def _build(cls: type, value: Any, where: str) -> Any:
    """Make the dataclass `cls` from a mapping of strings; `where` is the dotted path for messages."""
    prefix = f"{where}." if where else ""
    if value is None or (isinstance(value, str) and value in _NULLS):
        value = {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected settings (a mapping), found {_kind(value)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in value:
        if key not in fields:
            raise ConfigError(f"{prefix}{key}: unknown key{_nearest(key, list(fields))}")
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ConfigError(f"{prefix}{name}: missing; it has no default")
    arguments = {key: _convert(item, hints[key], f"{prefix}{key}") for key, item in value.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Turn YAML's strings, lists and mappings into what `hint` declares."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is object:
        return value  # converted later, by whoever knows its type
    if hint is Any:
        return _plain(value)
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, where)
    if origin is Literal:
        for choice in args:
            if str(choice) == value:
                return choice
        choices = ", ".join(str(choice) for choice in args)
        raise ConfigError(f"{where}: expected one of {choices}; found {value!r}")
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if hint is dict or origin is dict:
        if isinstance(value, str) and value in _NULLS:
            return {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, found {_kind(value)}")
        inner = args[1] if args else Any
        return {str(key): _convert(item, inner, f"{where}.{key}") for key, item in value.items()}
    if hint is list or origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, found {_kind(value)}")
        inner = args[0] if args else Any
        return [_convert(item, inner, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, list | Mapping):
        raise ConfigError(f"{where}: expected {_type_name(hint)}, found {_kind(value)}")
    return _convert_scalar(str(value), hint, where)


def _convert_scalar(text: str, hint: Any, where: str) -> Any:
    if hint is bool:
        if text.lower() in _TRUE:
            return True
        if text.lower() in _FALSE:
            return False
    elif hint is int:
        try:
            return int(text)
        except ValueError:
            pass
        # 1e3 is a whole number too; 2.5 is not.
        try:
            number = float(text)
        except ValueError:
            number = 0.5
        if number.is_integer():
            return int(number)
    elif hint is float:
        try:
            return float(text)
        except ValueError:
            pass
    elif (hint is str or (isinstance(hint, type) and issubclass(hint, enum.Enum))) and text not in _NULLS:
        # An enum of the library takes its word: `save_strategy: no` is the word, not False. Null is no word: a
        # folder named "null", or the one that "" stands for, is never meant.
        return text
    raise ConfigError(f"{where}: expected {_type_name(hint)}, found {'nothing' if text in _NULLS else repr(text)}")


def _convert_union(value: Any, members: Sequence[Any], where: str) -> Any:
    """Take the first member that fits, from the narrowest type to the widest."""
    if type(None) in members and isinstance(value, str) and value in _NULLS:
        return None
    order = [dict, list, bool, int, float]
    # Where one form of the value is meant (a word, or a list of words), only that one's complaint helps.
    rest = [m for m in members if m is not type(None)]
    rest = [m for m in rest if _is_shape(m, value)] or rest
    rest.sort(key=lambda m: next((i for i, t in enumerate(order) if t in (m, typing.get_origin(m))), len(order)))
    problem: ConfigError | None = None
    for member in rest:
        try:
            return _convert(value, member, where)
        except ConfigError as error:
            if problem is None or dataclasses.is_dataclass(member) or len(rest) == 1:
                problem = error
    if len(rest) > 1 and not any(dataclasses.is_dataclass(m) for m in rest):
        names = " or ".join(_type_name(m) for m in rest)
        raise ConfigError(f"{where}: expected {names}, found {value!r}")
    assert problem is not None
    raise problem


def _is_shape(hint: Any, value: Any) -> bool:
    """Whether a list, a mapping or a scalar of YAML is the kind of thing that `hint` asks for."""
    kind = typing.get_origin(hint) or hint
    if isinstance(value, list):
        return kind is list
    if isinstance(value, Mapping):
        return kind is dict or dataclasses.is_dataclass(kind)
    return not (kind in (list, dict) or dataclasses.is_dataclass(kind))


def _plain(value: Any) -> Any:
    """YAML's usual reading, for values whose type nothing declares."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and _is_float(value) else yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            # Looks like a date or a number and is none: 2024-13-45, 0x_.
            return value
    return value


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known[:20])}"


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return "nothing" if value in (None, "") else repr(value)


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint) or str(hint)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
