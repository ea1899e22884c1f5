"""A transformers.Trainer for joined preference pairs: ours are the collator, the loss and the metrics.

The reference is two numbers per pair in the batch; nothing here knows how to load a second model.
"""

import dataclasses
import functools
import multiprocessing.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers.integrations import integration_utils

from pipeline.attempts import Attempt, set_aside
from pipeline.config import OWN_TRAIN_FIELDS, Config, LossConfig, training_settings
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.join import TokenLogps
from pipeline.losses import PairLoss, Pairs, total_loss, wpo_weights
from pipeline.offload import ActivationOffload
from pipeline.packing import Batch, make_batch
from pipeline.processes import on_main_process
from pipeline.recording import Margins
from pipeline.scoring import Scores, score, weighted_sums
from pipeline.sharded import load_optimizer, name_plugin, put_weights, save_optimizer, whole_weights
from pipeline.signals import work_unsignalled
from pipeline.tokens import TokenizedPair, truncate

__all__ = [
    "EvaluationLeft",
    "PairTrainer",
    "balance_weight",
    "make_collator",
    "processes_of",
    "router_aux_weight",
    "saving",
    "training_arguments",
]


def make_collator(pad_id: int, max_length: int | None, token_logps: TokenLogps | None = None, *, packed: bool) -> Any:
    """Make the function that turns rows of the joined set into one micro-batch.

    Args:
        pad_id: What padding is filled with, where there is any.
        max_length: As the pairs were joined.
        token_logps: The file that the rows' `token_start` counts in; without it there are no `ref_token_logps`.
        packed: Pack the pairs into one row, if the model can read that; otherwise pad them.
    """

    # Not a function in a function: loader processes that are not forks get it as a pickle.
    return functools.partial(_collate, pad_id=pad_id, max_length=max_length, token_logps=token_logps, packed=packed)


def _collate(
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_id: int,
    max_length: int | None,
    token_logps: TokenLogps | None,
    packed: bool,
) -> dict[str, Any]:
    pairs = []
    for row in rows:
        whole = TokenizedPair(
            prompt_ids=row["prompt_ids"], chosen_ids=row["chosen_ids"], rejected_ids=row["rejected_ids"]
        )
        pair = truncate(whole, max_length)
        if pair is None:
            raise AssertionError(f"row {row['row']} should have been dropped: its prompt fills max_length")
        pairs.append(pair)
    # The first entry tells the library how many pairs there are.
    columns: dict[str, Any] = {
        "ref_chosen_logps": torch.tensor([row["ref_chosen_logps"] for row in rows], dtype=torch.float32),
        "ref_rejected_logps": torch.tensor([row["ref_rejected_logps"] for row in rows], dtype=torch.float32),
        "truncated": torch.tensor([row["truncated"] for row in rows], dtype=torch.float32),
        "batch": make_batch(pairs, pad_id, packed=packed),
    }
    if token_logps is not None and "token_start" in rows[0]:
        # [N], in the order in which the scorer gives the policy's
        columns["ref_token_logps"] = _ref_token_logps(rows, pairs, token_logps)
    return columns


def _ref_token_logps(
    rows: Sequence[Mapping[str, Any]], pairs: Sequence[TokenizedPair], token_logps: TokenLogps
) -> torch.Tensor:
    """Read the reference's token logps: all chosen completions', then all rejected ones', [N] float32."""
    sides: tuple[list[Any], list[Any]] = ([], [])
    for row, pair in zip(rows, pairs, strict=True):
        chosen, both = len(pair.chosen_ids), len(pair.chosen_ids) + len(pair.rejected_ids)
        # A pair that was not scored has none; the loader may fetch it ahead, but the loss refuses it.
        unscored = row["token_start"] < 0
        values = np.full(both, np.nan, np.float32) if unscored else token_logps.read(row["token_start"], both)
        sides[0].append(values[:chosen])
        sides[1].append(values[chosen:])
    return torch.from_numpy(np.concatenate([*sides[0], *sides[1]]))


def training_arguments(config: Config) -> transformers.TrainingArguments:
    """Make the library's arguments from the settings, and refuse what can't work.

    Raises:
        ConfigError: A field is unknown, of the wrong type, or impossible here.
    """
    settings = training_settings(config)
    for own in OWN_TRAIN_FIELDS:
        settings.pop(own, None)
    if str(settings.get("fsdp")).lower() in ("true", "yes", "on", "false", "no", "off"):
        # The library declares a word, its old way of saying how; YAML's yes and no are meant.
        settings["fsdp"] = _is_on(settings["fsdp"]) or None
    _check_launcher(settings)
    try:
        made = transformers.TrainingArguments(**settings, remove_unused_columns=False, label_names=[])
    except (ValueError, TypeError, ImportError, OSError) as error:
        # OSError: a file of fsdp_config or deepspeed that is not there.
        raise ConfigError(f"train: {' '.join(str(error).split())}") from error
    # Without an accelerator there is nothing to pin for, and the loader would say so for every set.
    made.dataloader_pin_memory &= made.device.type != "cpu"
    if made.n_gpu > 1:
        raise ConfigError(
            "train: several GPUs are visible to one process; start one for each (refshard train --processes N), or set "
            "CUDA_VISIBLE_DEVICES to one of them"
        )
    if made.world_size == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Each would train the whole run by itself, into one folder.
        raise ConfigError(
            f"train: {os.environ['WORLD_SIZE']} processes were started, but none sees a GPU of its own; to train in "
            "processes on CPUs, set train.use_cpu: true"
        )
    _check_trackers(made)
    _check_fsdp(made, config)
    _check_deepspeed(made)
    if made.eval_strategy != "no" and not config.data.eval:
        raise ConfigError("train.eval_strategy: set, but data.eval names no held-out set")
    if getattr(made, "train_sampling_strategy", None) == "group_by_length":
        raise ConfigError("train.train_sampling_strategy: group_by_length is not supported; leave it out or use random")
    if made.save_strategy == "best" and not made.metric_for_best_model:
        raise ConfigError("train.save_strategy: best of what? Set train.metric_for_best_model, like eval_loss")
    if made.save_total_limit == 1:
        raise ConfigError(
            "train.save_total_limit: at least 2, since the checkpoint before is what is left if the newest is cut short"
        )
    if config.reference.sync is not None:
        if made.save_strategy == "best":
            raise ConfigError("train.save_strategy: best can't be told across windows (reference.sync)")
        if made.world_size > 1:
            raise ConfigError(
                f"reference.sync: {made.world_size} processes; windows are planned for one process. Start it alone"
            )
        if made.save_strategy == "no":
            # Every window ends in a checkpoint; one behind the newest is kept, in case that one is cut short.
            made.save_total_limit = made.save_total_limit or 2
    return made


def _check_launcher(settings: Mapping[str, Any]) -> None:
    """Refuse what accelerate was told and the settings were not: one of the two would be the one that is not heard."""
    for key, name in (("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")):
        if _is_on(os.environ.get(f"ACCELERATE_USE_{name.upper()}")) and not settings.get(key):
            raise ConfigError(
                f"train.{key}: accelerate launch was told to use {name}, but the settings were not; set train.{key}, "
                "and leave it out of accelerate's own settings"
            )


def _check_fsdp(made: transformers.TrainingArguments, config: Config) -> None:
    if not made.fsdp:
        return
    settings = cast("dict[str, Any]", made.fsdp_config)
    if made.world_size == 1:
        raise ConfigError(
            "train.fsdp: one process has nobody to share the policy with; start with torchrun or accelerate launch, or "
            "leave it out (-o train.fsdp=false), also to go on alone with a run that had several"
        )
    if int(settings.get("version", 2)) != 2 or settings.get("xla"):
        raise ConfigError("train.fsdp_config: FSDP2 alone is supported; set version: 2, and leave xla out")
    if str(settings.get("state_dict_type", "FULL_STATE_DICT")) not in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        raise ConfigError("train.fsdp_config.state_dict_type: expected FULL_STATE_DICT or SHARDED_STATE_DICT")
    if _is_on(settings.get("cpu_ram_efficient_loading")):
        raise ConfigError(
            "train.fsdp_config.cpu_ram_efficient_loading: can't be set: each process checks the policy that it has "
            "loaded before it is sharded"
        )
    if _is_on(settings.get("activation_checkpointing")) and config.policy.has_adapter:
        # PEFT saves what it finds by its modules' names, which the checkpoints' wrappers change: an empty adapter.
        raise ConfigError(
            "train.fsdp_config.activation_checkpointing: can't be set with an adapter; set train.gradient_checkpointing"
        )


def _check_deepspeed(made: transformers.TrainingArguments) -> None:
    if not made.deepspeed:
        return
    settings: Any = made.hf_deepspeed_config
    if settings.is_zero3() and not settings.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save"):
        raise ConfigError(
            "train.deepspeed: set zero_optimization.stage3_gather_16bit_weights_on_model_save: true, without which no "
            "policy would be saved that can be loaded"
        )


def _is_on(value: Any) -> bool:
    return str(value).lower() in ("true", "yes", "on", "1")


class EvaluationLeft(Exception):
    """A stop request came during an evaluation, or before a step was taken: all is left where it stands.

    Args:
        save: Whether there is time, and something, to be saved.
    """

    def __init__(self, *, save: bool) -> None:
        super().__init__()
        self.save = save


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Tell a disk that failed under the libraries, which have errors of their own for it, from a bug.

    Raises:
        StorageError: It did.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # What torch.save says when it can't write; a RuntimeError can be anything else.
        if (
            type(error) is RuntimeError
            and "PytorchStreamWriter" not in str(error)
            and "unexpected pos" not in str(error)
        ):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise StorageError(
            f"{what} can't be saved ({reason}). Free some space and run the same command again"
        ) from error


class PairTrainer(transformers.Trainer):
    """Trains a policy on pairs that carry their reference logps.

    Args:
        loss: What is made small.
        activation_offload: Have what backward needs wait in the CPU's memory.
        attempt: This start of the run; it saves only as long as the run's folder is its own.
        load_policy: Loads the policy as a checkpoint has it, for the best one of a run under FSDP.
        margins: Takes what each pair has come to.
    """

    model: torch.nn.Module

    def __init__(
        self,
        *,
        loss: LossConfig,
        activation_offload: bool = False,
        attempt: Attempt | None = None,
        load_policy: Callable[[Path], Any] | None = None,
        margins: Margins | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._attempt = attempt
        self._load_policy = load_policy
        self._margins = margins
        # Workers that are left to the process's end are told to end then, and must know that it is meant.
        self._closing: Any = multiprocessing.RawValue("b", 0)
        # Not atexit: a process that was itself started by multiprocessing does not come there.
        multiprocessing.util.Finalize(None, setattr, args=(self._closing, "value", 1), exitpriority=0)
        self._loss = loss
        self._offload = ActivationOffload(kwargs["model"]) if activation_offload else None
        self._balance_weight = balance_weight(kwargs["model"], loss)
        # The loss is a mean over pairs already; the library must divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._totals: dict[str, dict[str, float]] = {"train": {}, "eval": {}}

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            name_plugin(self.accelerator.state, self.args.fsdp_plugin_args or {})
            self.is_fsdp_enabled = hasattr(self.accelerator.state, "fsdp_plugin")
        if self.args.deepspeed and not self.is_deepspeed_enabled:
            raise ConfigError(
                "train.deepspeed: accelerate makes DDP of it where it was started for CPUs (ACCELERATE_USE_CPU, "
                "accelerate launch --cpu); start with torchrun and train.use_cpu: true"
            )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean loss of the micro-batch's pairs; metrics are added up on the way.

        Raises:
            DataError: A pair has no reference logps.
        """
        if not torch.isfinite(inputs["ref_chosen_logps"] + inputs["ref_rejected_logps"]).all():
            raise DataError("a pair without reference logps came up for training; nothing unscored is read as a number")
        batch = cast(Batch, inputs["batch"]).to(self.args.device)
        with self._offload if self._offload and torch.is_grad_enabled() else nullcontext():
            scores = score(model, batch, squares=self._loss.use_weighting, aux_loss=self._balance_weight != 0)
        pairs = _pairs(scores, inputs, self._loss)
        objective = total_loss(pairs, self._loss)
        loss = objective.loss
        if not self.model.training and 0 < (real := self._real_pairs(batch.num_pairs)) < batch.num_pairs:
            loss = total_loss(_first(pairs, real), self._loss).loss
        if scores.aux_loss is not None:
            loss = loss + self._balance_weight * scores.aux_loss
        self._add_metrics(_per_pair_columns(batch, scores, inputs, pairs, objective))
        return (loss, {"loss": objective.loss.detach()}) if return_outputs else loss

    def _real_pairs(self, count: int) -> int:
        """How many of this process's held-out pairs are not there to fill up the set's last batches.

        What they give is taken out of what the processes measured; but a mean over them would still be in it.
        """
        gradient_state: Any = self.accelerator.gradient_state
        if self.args.world_size == 1 or not gradient_state.end_of_dataloader or gradient_state.remainder <= 0:
            return count
        return int(gradient_state.remainder - self.args.process_index * count)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # The library counts by the ids that went in.
        return int(super().floating_point_ops({"input_ids": inputs["batch"].input_ids}))

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        # Loaders draw a seed when they start. Training's random numbers must not depend on how often it is measured.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            metrics = super().evaluate(*arguments, **options)
        if self._margins is not None:
            prefix = next(key[: -len("_runtime")] for key in metrics if key.endswith("_runtime"))
            self._margins.finish_set(prefix, self.state.global_step)
        return metrics

    def finish_evaluation(self, checkpoint: Path) -> None:
        """Evaluate, if the checkpoint that training goes on from was saved when a stop request had ended that."""
        # The library saves its control with it, in which an evaluation is due until it is done.
        saved: Any = self.state.stateful_callbacks
        if not saved.get("TrainerControl", {}).get("args", {}).get("should_evaluate"):
            return
        metrics = self._evaluate(trial=None, ignore_keys_for_eval=None)
        if self._determine_best_metric(metrics, trial=None):
            self.state.best_model_checkpoint = str(checkpoint)

    def save_checkpoint(self) -> None:
        """Save what the run goes on from, between the steps at which the library does so by itself."""
        self._save_checkpoint(self.model_wrapped, trial=None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def forget_evaluation(self) -> None:
        """Drop what an evaluation that was left has measured, of this step's held-out sets."""
        step = self.state.global_step
        self.state.log_history = [
            entry
            for entry in self.state.log_history
            if entry["step"] != step or not any(key.startswith("eval_") for key in entry)
        ]
        self._totals["eval"].clear()
        if self._margins is not None:
            self._margins.forget()
        self.model.train()

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*arguments, **options)
        except EvaluationLeft as left:
            # The control, in which the evaluation is due still, is saved with the checkpoint.
            self.forget_evaluation()
            self.control.should_training_stop = True
            if left.save:
                self.save_checkpoint()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        def make_way(folder: Path) -> None:
            self._check_owner()
            if folder.exists():
                # Of a start that this one has taken over from: its files and ours must never be in one folder.
                set_aside(folder)

        on_main_process(lambda: make_way(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"))
        with saving(f"{self.args.output_dir}: the checkpoint of step {self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    # A process that was stopped while it saved may come back when another start has made a folder of the same name,
    # so it looks again before each of the files.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_deepspeed_enabled and self.deepspeed is None:
            # All steps were done at the start: the policy is in one piece, and DeepSpeed was never begun.
            if self.args.should_save:
                self._save(output_dir)
            return
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        # Where the state is saved in shares, the library would save no model at all.
        weights = whole_weights(self.model, trained_only=hasattr(self.model, "peft_config"))
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._check_owner()
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder, whole = Path(output_dir), not self._saves_shares
        save_optimizer(self._inner_optimizer, folder, self.args.process_index, self.args.world_size, whole=whole)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")

    @property
    def _saves_shares(self) -> bool:
        return "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        return cast(torch.optim.Optimizer, getattr(optimizer, "optimizer", optimizer))  # accelerate's is around it

    def _save_rng_state(self, output_dir: str) -> None:
        self._check_owner()
        super()._save_rng_state(output_dir)

    def _check_owner(self) -> None:
        # Every process has files of its own to save.
        if self._attempt is not None:
            self._attempt.check()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing where the library would load the weights: the policy was loaded from the checkpoint.

        `from_pretrained` knows all that a saved folder may be; this method of the library warns of weights that it
        does not find, and knows nothing of what is renamed or merged when a model is loaded.
        """
        if self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled:
            super()._load_best_model()
            return
        has_adapter = hasattr(self.model, "peft_config")
        weights: dict[str, torch.Tensor] = {}

        def read() -> None:
            assert self._load_policy is not None
            policy = self._load_policy(Path(str(self.state.best_model_checkpoint)))
            named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
            weights.update(named if has_adapter else policy.state_dict())

        on_main_process(read)
        put_weights(self.model, weights, trained_only=has_adapter)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        processes_of(folder)
        if self.is_deepspeed_enabled:
            # Weights and optimizer are with DeepSpeed by now, which reads them from pickles that can run code: none is
            # read but from a checkpoint whose marker and digests hold (find_checkpoint).
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if not (folder / "scheduler.pt").is_file():
            raise DataError(f"{folder}: scheduler.pt is missing, so that the run can't go on as if it never stopped")
        load_optimizer(self._inner_optimizer, folder)
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        self._check_loaded(folder)

    def _check_loaded(self, checkpoint: Path) -> None:
        """Make sure that optimizer and schedule are those of the training's step."""
        if self.args.fp16:
            # With a loss scale, steps that overflow are counted by the library and not by the optimizer.
            return
        step = self.state.global_step
        counted = {int(state["step"]) for state in self._inner_optimizer.state.values() if "step" in state}
        if counted and max(counted) != step:
            raise DataError(f"{checkpoint / 'optimizer.pt'}: has taken {max(counted)} steps, the training {step}")
        schedule = self.lr_scheduler
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR) and schedule.last_epoch != step:
            raise DataError(f"{checkpoint / 'scheduler.pt'}: is at step {schedule.last_epoch}, the training at {step}")

    def _get_dataloader(self, *arguments: Any, **options: Any) -> Any:
        loader = super()._get_dataloader(*arguments, **options)
        # The one that has the workers is inside of accelerate's.
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = functools.partial(_start_worker, self._closing, inner.worker_init_fn)
        return loader

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of the arguments, access tokens included. Nothing here reads it; refshard.yaml has the settings.
        (Path(output_dir or str(self.args.output_dir)) / "training_args.bin").unlink(missing_ok=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the averages since the last log to what the library logs, under TRL's names."""
        mode = "train" if self.model.training else "eval"
        totals = self._totals[mode]
        # The library also logs a summary of the whole run at its end, when nothing has been added up.
        if totals:
            prefix = "" if mode == "train" else next((k[: -len("loss")] for k in logs if k.endswith("_loss")), "eval_")
            logs.update({f"{prefix}{name}": value for name, value in _averages(totals).items()})
            logs[f"{prefix}num_tokens"] = float(self.state.num_input_tokens_seen)
            totals.clear()
        super().log(logs, start_time)

    def _add_metrics(self, columns: Mapping[str, torch.Tensor]) -> None:
        mode = "train" if self.model.training else "eval"
        # One collective per micro-batch: [pairs of all ranks, columns]. Pairs that fill up the last one of an epoch are
        # trained on, and counted; held-out ones are not. (In training the library fetches a step's micro-batches at
        # once, and accelerate would take each of them for the last.)
        gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
        stacked = gather(torch.stack(list(columns.values()), dim=1)).double().cpu()
        if self._margins is not None:
            self._margins.add(dict(zip(columns, stacked.unbind(dim=1), strict=True)), training=mode == "train")
        totals = self._totals[mode]
        for name, total in zip(columns, stacked.sum(dim=0).tolist(), strict=True):
            totals[name] = totals.get(name, 0.0) + total
        totals["pairs"] = totals.get("pairs", 0.0) + stacked.shape[0]
        if mode == "train":
            # Kept in the library's own counter, so that a checkpoint carries it.
            self.state.num_input_tokens_seen += int(stacked[:, list(columns).index("tokens")].sum().item())


def _check_trackers(made: transformers.TrainingArguments) -> None:
    """Make sure that the trackers are installed, which the library says after the model is loaded.

    None is made for that: some lock files, or open a connection, as soon as they are.
    """
    try:
        integration_utils.get_reporting_integration_callbacks(made.report_to)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ConfigError(f"train.report_to: {' '.join(str(error).split())}") from error
    for tracker in made.report_to or ():
        # The library asks for azure_ml by is_azureml_available, for comet_ml by is_comet_available.
        names = (f"is_{spelled}_available" for spelled in (tracker.replace("_", ""), tracker.replace("_ml", "")))
        is_available = next((found for name in names if (found := getattr(integration_utils, name, None))), None)
        if is_available is not None and not is_available():
            package = tracker.replace("_", "-")
            raise ConfigError(f"train.report_to: {tracker} is not installed: pip install {package}")


def processes_of(checkpoint: Path) -> int:
    """Say how many processes saved a checkpoint, by the random states that are in it.

    Raises:
        DataError: There is none, or not that of every process.
    """
    found = {file.name for file in checkpoint.glob("rng_state*.pth")}
    if "rng_state.pth" in found:
        return 1
    wanted = [f"rng_state_{rank}.pth" for rank in range(max(len(found), 2))] if found else ["rng_state.pth"]
    for name in wanted:
        if name not in found:
            raise DataError(f"{checkpoint}: {name} is missing, so that the run can't go on as if it never stopped")
    return len(found)


def _start_worker(closing: Any, seed: Callable[[int], None] | None, worker: int) -> None:
    work_unsignalled(closing)
    if seed is not None:
        seed(worker)


def router_aux_weight(config: Any, loss: LossConfig) -> float:
    """Weight of the balance loss: the settings', or the model's own; 0 for a model without experts.

    Raises:
        ConfigError: A weight is set for a model that has no balance loss.
    """
    has_balance = hasattr(config, "output_router_logits")
    if loss.router_aux_loss_coef and not has_balance:
        raise ConfigError(
            f"loss.router_aux_loss_coef: {config.model_type} is no mixture of experts that gives its router's logits; "
            "leave it out"
        )
    if not has_balance:
        return 0.0
    own = getattr(config, "router_aux_loss_coef", 0.0)
    return float(own if loss.router_aux_loss_coef is None else loss.router_aux_loss_coef)


def balance_weight(model: Any, loss: LossConfig) -> float:
    """Give the weight of the balance loss for a loaded model; 0 where no layer of it has experts."""
    return router_aux_weight(model.config.get_text_config(), loss) if _has_router(model) else 0.0


def _has_router(model: Any) -> bool:
    """Whether any layer has experts: a family of mixtures has members without (Jamba with one expert)."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    recorders = (getattr(causal.base_model, "_can_record_outputs", None) or {}).get("router_logits")
    if recorders is None:
        return True  # Not said; the config is.
    # A class of modules, or a record of one with the name that they go by in a layer.
    wanted: list[tuple[Any, str]] = [
        (getattr(recorder, "target_class", recorder), getattr(recorder, "layer_name", None) or "")
        for recorder in (recorders if isinstance(recorders, list | tuple) else (recorders,))
    ]
    return any(
        isinstance(module, kind) and part in name for name, module in causal.named_modules() for kind, part in wanted
    )


def _pairs(scores: Scores, inputs: Mapping[str, torch.Tensor], loss: LossConfig) -> Pairs:
    """What the losses look at: policy logps from the scorer, reference logps from the batch."""
    chosen, rejected = plain = scores.sums()
    if loss.ld_alpha is not None:
        # The reference's sums were weighed by the join, in the same way.
        chosen, rejected = weighted_sums(scores.tokens.logps, scores.lengths, loss.ld_alpha)
    weights = None
    if scores.tokens.log_sum_squares is not None:
        weights = wpo_weights(scores.tokens.logps, scores.tokens.log_sum_squares, scores.lengths)
    chosen_tokens, rejected_tokens = scores.lengths.chunk(2)
    return Pairs(
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=inputs["ref_chosen_logps"],
        ref_rejected_logps=inputs["ref_rejected_logps"],
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        chosen_plain_logps=plain[0],
        wpo_weights=weights,
    )


def _first(pairs: Pairs, count: int) -> Pairs:
    columns = {field.name: getattr(pairs, field.name) for field in dataclasses.fields(pairs)}
    return dataclasses.replace(
        pairs, **{name: column[:count] for name, column in columns.items() if column is not None}
    )


def _per_pair_columns(
    batch: Batch, scores: Scores, inputs: Mapping[str, torch.Tensor], pairs: Pairs, objective: PairLoss
) -> dict[str, torch.Tensor]:
    """Everything that is averaged, as sums per pair: each [P], float32."""
    ref_margins = pairs.ref_chosen_logps - pairs.ref_rejected_logps
    margins = objective.chosen_rewards - objective.rejected_rewards
    columns = {
        "logps/chosen": pairs.chosen_logps,
        "logps/rejected": pairs.rejected_logps,
        "logps/chosen_shift": pairs.chosen_ratios,
        "rewards/chosen": objective.chosen_rewards,
        "rewards/rejected": objective.rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": _share_above_zero(margins),
        "ref/margins": ref_margins,
        "ref/accuracies": _share_above_zero(ref_margins),
        "lengths/chosen": pairs.chosen_tokens,
        "lengths/rejected": pairs.rejected_tokens,
        "lengths/truncated": inputs["truncated"],
    }
    if scores.aux_loss is not None:
        columns["aux_loss"] = scores.aux_loss.expand(batch.num_pairs)
    columns["tokens"] = batch.num_tokens
    tokens = scores.tokens
    assert tokens.entropy is not None and tokens.is_top1 is not None and tokens.mean_logit is not None
    per_token = {"entropy": tokens.entropy, "top1": tokens.is_top1, "logit": tokens.mean_logit}
    if "ref_token_logps" in inputs:
        # The k3 estimator (joschu.net/blog/kl-approx.html): never negative, 0 where the two agree.
        gap = inputs["ref_token_logps"] - tokens.logps.detach()
        per_token["kl"] = torch.expm1(gap) - gap
    rows = torch.repeat_interleave(scores.lengths)
    for name, values in per_token.items():
        sums = torch.zeros(len(scores.lengths), device=values.device).index_add(0, rows, values.detach().float())
        columns[f"{name}_chosen"], columns[f"{name}_rejected"] = sums.chunk(2)
    columns["num_chosen"], columns["num_rejected"] = scores.lengths.chunk(2)
    return {name: values.detach().float() for name, values in columns.items()}


def _share_above_zero(margins: torch.Tensor) -> torch.Tensor:
    # A tie says nothing: it counts as half right, so a policy equal to its reference reads 0.5, not 0.
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def _averages(totals: Mapping[str, float]) -> dict[str, float]:
    """Averages over pairs, or over tokens where the metric is one of tokens."""
    chosen, rejected, pairs = totals["num_chosen"], totals["num_rejected"], totals["pairs"]
    averages = {name: total / pairs for name, total in totals.items() if "/" in name or name == "aux_loss"}
    averages["logits/chosen"] = totals["logit_chosen"] / chosen
    averages["logits/rejected"] = totals["logit_rejected"] / rejected
    if "kl_chosen" in totals:
        averages["kl/chosen"] = totals["kl_chosen"] / chosen
        averages["kl/rejected"] = totals["kl_rejected"] / rejected
    averages["entropy"] = (totals["entropy_chosen"] + totals["entropy_rejected"]) / (chosen + rejected)
    averages["mean_token_accuracy"] = totals["top1_chosen"] / chosen
    return averages
