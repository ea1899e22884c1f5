"""A transformers.Trainer for joined preference pairs, with its own loss, metrics and checks of checkpoints.

The reference is two numbers per pair in the batch. No second model is loaded. Four private methods of the library are
overridden; the contract test names them and all else here that the library does not document.
"""

import dataclasses
import functools
import math
import multiprocessing.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError

from pipeline.base.errors import ConfigError, DataError, StorageError, is_out_of_memory
from pipeline.base.signals import work_unsignalled
from pipeline.config.loss import LossConfig
from pipeline.run.attempts import Attempt, set_aside
from pipeline.run.checkpoints import newest_step, processes_of
from pipeline.scoring.forward import Want, score
from pipeline.training.batches import JoinedBatch
from pipeline.training.dynamic_beta import DynamicBeta
from pipeline.training.finite import FiniteWatch
from pipeline.training.fsdp import (
    keep_outputs,
    load_optimizer,
    name_plugin,
    put_weights,
    save_optimizer,
    shard_exactly,
    whole_weights,
)
from pipeline.training.losses import balance_weight, total_loss
from pipeline.training.metrics import MetricsBySet, averages_of, columns_of, first_pairs, pairs_of
from pipeline.training.offload import ActivationOffload
from pipeline.training.processes import on_main_process
from pipeline.training.recording import Margins
from pipeline.training.settings import building

__all__ = ["EvaluationLeft", "PairTrainer", "gpus_of", "saving"]


class EvaluationLeft(Exception):
    """A stop request came during an evaluation, or before the first step; `save` asks for a checkpoint."""

    def __init__(self, *, save: bool) -> None:
        super().__init__()
        self.save = save


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Raise StorageError if the disk is full or failing, for which the libraries have errors of their own."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        # torch.save's words for a write that failed. Any other RuntimeError is something else.
        words = ("PytorchStreamWriter", "unexpected pos")
        if type(error) is RuntimeError and not any(word in str(error) for word in words):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise StorageError(
            f"{what} can't be saved ({reason}). Free some space and run the same command again"
        ) from error


class PairTrainer(transformers.Trainer):
    """Trains a policy on pairs that carry their reference logps.

    Args:
        loss: The `loss` section.
        activation_offload: Keep activations in the CPU's memory until backward needs them.
        attempt: The run's attempt, which saves only while it owns the run's folder.
        margins: Collects each pair's margins.
        finite: Watches that each step is finite.
        set_names: Names of several training sets, by the numbers in the batches: sorted.
        before_training: Called with the trainer once all is ready for the first step.
    """

    model: torch.nn.Module

    def __init__(
        self,
        *,
        loss: LossConfig,
        activation_offload: bool = False,
        attempt: Attempt | None = None,
        margins: Margins | None = None,
        finite: FiniteWatch | None = None,
        set_names: Sequence[str] = (),
        before_training: Callable[["PairTrainer"], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.add_callback(_BeforeTraining(self, before_training))
        self._finite = finite
        if finite is not None:
            finite.attach(self.accelerator)
        self._attempt = attempt
        self._margins = margins
        self._by_set = MetricsBySet(set_names)
        # Stop the loaders' workers before the interpreter exits. They ignore a SIGTERM unless this is set.
        self._closing: Any = multiprocessing.RawValue("b", 0)
        # Not atexit, which does not run in a process that multiprocessing started.
        multiprocessing.util.Finalize(None, setattr, args=(self._closing, "value", 1), exitpriority=0)
        self._loss = loss
        self._dynamic_beta = DynamicBeta(loss, self.args.seed) if "beta_dpo" in loss.types else None
        self._offload = ActivationOffload(kwargs["model"]) if activation_offload else None
        self._total_weight: float | None = None
        self._balance_weight = balance_weight(kwargs["model"], loss)
        # The loss is a mean over pairs, which the library must divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self._totals: dict[str, dict[str, float]] = {"train": {}, "eval": {}}

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            name_plugin(self.accelerator.state, self.args.fsdp_plugin_args or {})
            self.is_fsdp_enabled = hasattr(self.accelerator.state, "fsdp_plugin")
        if self.is_fsdp_enabled:
            keep_outputs(self.accelerator.state.fsdp_plugin)
            shard_exactly(self.accelerator)
        if self.args.deepspeed and not self.is_deepspeed_enabled:
            raise ConfigError(
                "train.deepspeed: accelerate, started for CPUs (ACCELERATE_USE_CPU, accelerate launch --cpu), runs DDP "
                "in its place. Start with torchrun and set train.use_cpu: true"
            )

    def create_optimizer(self, model: Any = None) -> Any:
        with building("optim", "an optimizer", self.args.optim, "optim_args"):
            return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        with building("lr_scheduler_type", "a schedule", self.args.lr_scheduler_type, "lr_scheduler_kwargs"):
            return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute the mean loss of the micro-batch's pairs, and add up their metrics.

        Raises DataError if a pair has no reference logps.
        """
        joined = cast(JoinedBatch, inputs["joined"]).to(self.args.device)
        batch = joined.batch
        unscored = ~torch.isfinite(joined.ref_chosen_logps + joined.ref_rejected_logps)
        if self._loss.needs_reference and unscored.any():
            raise DataError("a pair without reference logps came up for training; nothing unscored is read as a number")
        with self._offload if self._offload and torch.is_grad_enabled() else nullcontext():
            want = Want(squares=self._loss.use_weighting, aux_loss=self._balance_weight != 0)
            scores = score(model, batch, want)
        pairs = pairs_of(scores, joined, self._loss)
        if self._dynamic_beta is not None and self.model.training:
            # Checkpoints hold the library's state, and with it the running means.
            state = cast(Any, self.state.stateful_callbacks).setdefault("beta_dpo", {})
            pairs = self._dynamic_beta.apply(pairs, state, self.accelerator.gather, self.accelerator.process_index)
        if joined.weights is not None and self.model.training:
            pairs = dataclasses.replace(pairs, weights=joined.weights, total_weight=self._total_weight)
        objective = total_loss(pairs, self._loss)
        loss = objective.loss
        if not self.model.training and 0 < (real := self._real_pairs(batch.num_pairs)) < batch.num_pairs:
            loss = total_loss(first_pairs(pairs, real), self._loss).loss
        if scores.aux_loss is not None:
            loss = loss + self._balance_weight * scores.aux_loss
        self._add_metrics(columns_of(joined, scores, pairs, objective, self._loss), joined.ids)
        if self._finite is not None and self.model.training:
            self._finite.take_loss(loss)
        return loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Fetch a step's micro-batches, and take the mean weight of one of them, over all processes.

        The library averages over micro-batches and processes. A pair counts by its weight in the whole step.
        """
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        weights = [sample["joined"].weights for sample in samples]
        if weights and weights[0] is not None:
            total = torch.stack([each.sum() for each in weights]).sum().to(self.args.device)
            summed = self.accelerator.gather(total.reshape(1))
            self._total_weight = float(summed.mean()) / len(samples)
        return samples, items

    def _real_pairs(self, count: int) -> int:
        """Give the number of real (non-padding) pairs in this rank's last evaluation batch.

        The library drops the padding pairs' own results, but a mean over the batch would still hold them.
        """
        gradient_state: Any = self.accelerator.gradient_state
        if self.args.world_size == 1 or not gradient_state.end_of_dataloader or gradient_state.remainder <= 0:
            return count
        return int(gradient_state.remainder - self.args.process_index * count)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # The library counts by the number of ids.
        return int(super().floating_point_ops({"input_ids": inputs["joined"].batch.input_ids}))

    def get_train_dataloader(self) -> Any:
        return self._unsignalled(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._unsignalled(super().get_eval_dataloader(eval_dataset))

    def _unsignalled(self, loader: Any) -> Any:
        """Let the loader's workers ignore the signals that the run gets."""
        # Accelerate's loader wraps the one with the workers, which is the same in all evaluations if workers persist.
        inner = getattr(loader, "base_dataloader", loader)
        if getattr(inner.worker_init_fn, "func", None) is not _start_worker:
            inner.worker_init_fn = functools.partial(_start_worker, self._closing, inner.worker_init_fn)
        return loader

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        # Loaders draw a seed when they start. Training's random numbers must not depend on the evaluations.
        with torch.random.fork_rng(devices=gpus_of(self)):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self._margins is not None:
            self._margins.finish_set(metric_key_prefix, self.state.global_step)
        # The library takes an infinite margin for the best for ever, and NaN never.
        return {name: value if math.isfinite(value) else math.nan for name, value in metrics.items()}

    def finish_evaluation(self, checkpoint: Path) -> None:
        """Evaluate if the resumed checkpoint was saved by a stop request during an evaluation."""
        # The checkpoint holds the library's control, in which an evaluation is due until it is done.
        saved: Any = self.state.stateful_callbacks
        if not saved.get("TrainerControl", {}).get("args", {}).get("should_evaluate"):
            return
        metrics = self._evaluate(trial=None, ignore_keys_for_eval=None)
        if self._determine_best_metric(metrics, trial=None):
            self.state.best_model_checkpoint = str(checkpoint)

    def leave(self, *, save: bool) -> None:
        """Drop the results of an evaluation that was left, and end training.

        With `save`, save a checkpoint, unless no step was taken since the last one.
        """
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
        if save and on_main_process(lambda: newest_step(Path(str(self.args.output_dir)))) < step:
            # The checkpoint holds the control, in which the evaluation is still due.
            self._save_checkpoint(self.model_wrapped, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if self.is_in_train:
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._finite is not None and not self._finite.weights_are_finite:
            return

        def make_way(folder: Path) -> None:
            self._check_owner()
            if folder.exists():
                # An attempt that this one has taken over from wrote it. Its files and ours must never share a folder.
                set_aside(folder)

        on_main_process(lambda: make_way(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"))
        with saving(f"{self.args.output_dir}: the checkpoint of step {self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        # Under FSDP with sharded states, the library saves no model. If the resumed checkpoint was the last step's,
        # DeepSpeed was never started, and the policy is whole.
        if self.is_fsdp_enabled or (self.is_deepspeed_enabled and self.deepspeed is None):
            trained_only = hasattr(self.model, "peft_config")
            weights = whole_weights(self.model, trained_only=trained_only) if self.is_fsdp_enabled else None
            if self.args.should_save:
                self.accelerator.unwrap_model(self.model, keep_torch_compile=False).save_pretrained(
                    folder, state_dict=weights
                )
                assert self.processing_class is not None
                self.processing_class.save_pretrained(folder)
        else:
            super().save_model(str(folder), _internal_call)
        if self.args.should_save:
            # A pickle of the arguments, with access tokens. Nothing reads it; refshard.yaml holds the settings.
            (folder / "training_args.bin").unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # A process that was suspended during a save may wake after another attempt has made a folder of this name. So
        # every process checks before each of its files: the optimizer's state here, and its random state right after.
        self._check_owner()
        if self.is_fsdp_enabled:
            folder, whole = Path(output_dir), "SHARDED" not in str(self.accelerator.state.fsdp_plugin.state_dict_type)
            save_optimizer(self._inner_optimizer, folder, self.args.process_index, self.args.world_size, whole=whole)
            if self.args.should_save:
                assert self.lr_scheduler is not None
                torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        self._check_owner()

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        return cast(torch.optim.Optimizer, getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it

    def _check_owner(self) -> None:
        if self._attempt is not None:
            self._attempt.check()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load no weights: the policy was loaded from the checkpoint already.

        `from_pretrained` handles every saved folder. The library's method handles no weights that are renamed or
        merged on loading, and warns of them. It is not called under DeepSpeed.
        """

    def load_best(self, folder: Path, load_policy: Callable[[Path], Any]) -> None:
        """Load the weights of a checkpoint into the policy; `load_policy` loads one from a folder."""
        self.state.best_model_checkpoint = str(folder)
        model: Any = self.model
        engine: Any = self.deepspeed
        has_adapter = hasattr(model, "peft_config")
        if engine is not None:
            self._load_best_model()
        elif self.is_fsdp_enabled:
            weights: dict[str, torch.Tensor] = {}

            def read() -> None:
                policy = load_policy(folder)
                named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
                weights.update(named if has_adapter else policy.state_dict())

            on_main_process(read)
            put_weights(model, weights, trained_only=has_adapter)
        elif has_adapter:
            model.load_adapter(str(folder), model.active_adapter)
        else:
            # The library's method leaves weights out that are renamed or merged on loading.
            model.load_state_dict(load_policy(folder).state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        processes_of(folder)
        if self.is_deepspeed_enabled:
            # DeepSpeed has loaded weights and optimizer, from pickles that can run code. Only a checkpoint whose
            # marker and digests hold is ever read (find_checkpoint).
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if not (folder / "scheduler.pt").is_file():
            raise DataError(f"{folder}: scheduler.pt is missing, so the run can't resume exactly")
        load_optimizer(self._inner_optimizer, folder)
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        self._check_loaded(folder)

    def _check_loaded(self, checkpoint: Path) -> None:
        """Check that optimizer and schedule are those of the training's step."""
        if self.args.fp16:
            # With a loss scale, the library counts steps that overflow, and the optimizer does not.
            return
        step = self.state.global_step
        counted = {int(state["step"]) for state in self._inner_optimizer.state.values() if "step" in state}
        if counted and max(counted) != step:
            raise DataError(f"{checkpoint / 'optimizer.pt'}: has taken {max(counted)} steps, the training {step}")
        schedule = self.lr_scheduler
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR) and schedule.last_epoch != step:
            raise DataError(f"{checkpoint / 'scheduler.pt'}: is at step {schedule.last_epoch}, the training at {step}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the averages since the last log to the library's entry, under TRL's names."""
        mode = "train" if self.model.training else "eval"
        totals = self._totals[mode]
        # At the end the library also logs a summary of the whole run, when there are no totals.
        if totals:
            prefix = "" if mode == "train" else next((k[: -len("loss")] for k in logs if k.endswith("_loss")), "eval_")
            logs.update({f"{prefix}{name}": value for name, value in averages_of(totals).items()})
            logs.update(self._by_set.take() if mode == "train" else {})
            logs[f"{prefix}num_tokens"] = float(self.state.num_input_tokens_seen)
            totals.clear()
        if not math.isfinite(logs.get("loss", 0.0)):
            # The library subtracts the sum from itself, which leaves NaN in all later entries.
            self._tr_loss.zero_()
        super().log(logs, start_time)

    def _add_metrics(self, columns: Mapping[str, torch.Tensor], ids: torch.Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        # Two collectives per micro-batch: [pairs of all ranks, columns], and the ids, which floats would round. Pairs
        # that pad an epoch's last micro-batch are trained on and counted; padding held-out pairs are not. (In training
        # the library fetches a step's micro-batches at once, so accelerate would take each of them for the last.)
        gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
        stacked = gather(torch.stack(list(columns.values()), dim=1)).double().cpu()
        every_id = gather(ids).cpu()
        named = dict(zip(columns, stacked.unbind(dim=1), strict=True))
        if self._margins is not None:
            self._margins.add(named, every_id[:, :3], training=mode == "train")
        totals = self._totals[mode]
        for name, total in zip(columns, stacked.sum(dim=0).tolist(), strict=True):
            totals[name] = totals.get(name, 0.0) + total
        totals["pairs"] = totals.get("pairs", 0.0) + stacked.shape[0]
        if mode == "train":
            self._by_set.add(named, every_id[:, 3])
            # In the library's own counter, which checkpoints hold.
            self.state.num_input_tokens_seen += int(stacked[:, list(columns).index("tokens")].sum().item())


def gpus_of(trainer: transformers.Trainer) -> list[torch.device]:
    """Give the GPU that the trainer computes on, if any, as a list for `torch.random.fork_rng`."""
    device = trainer.args.device
    return [device] if device.type == "cuda" else []


class _BeforeTraining(transformers.TrainerCallback):
    def __init__(self, trainer: PairTrainer, action: Callable[[PairTrainer], None] | None) -> None:
        self._trainer = trainer
        self._action = action

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._action is not None:
            self._action(self._trainer)


def _start_worker(closing: Any, seed: Callable[[int], None] | None, worker: int) -> None:
    work_unsignalled(closing)
    if seed is not None:
        seed(worker)
