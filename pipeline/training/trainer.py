"""A transformers.Trainer for joined preference pairs: ours are the collator, the loss and the metrics.

The reference is two numbers per pair in the batch; nothing here knows how to load a second model.
"""

import functools
import multiprocessing.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError

from pipeline.base.errors import ConfigError, DataError, StorageError
from pipeline.base.signals import work_unsignalled
from pipeline.config.schema import LossConfig
from pipeline.run.attempts import Attempt, set_aside
from pipeline.run.checkpoints import processes_of
from pipeline.scoring.forward import Want, score
from pipeline.scoring.packing import Batch
from pipeline.training.fsdp import load_optimizer, name_plugin, put_weights, save_optimizer, whole_weights
from pipeline.training.losses import balance_weight, total_loss
from pipeline.training.metrics import averages_of, columns_of, first_pairs, pairs_of
from pipeline.training.offload import ActivationOffload
from pipeline.training.processes import on_main_process
from pipeline.training.recording import Margins

__all__ = [
    "EvaluationLeft",
    "PairTrainer",
    "saving",
]


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
            want = Want(squares=self._loss.use_weighting, aux_loss=self._balance_weight != 0)
            scores = score(model, batch, want)
        pairs = pairs_of(scores, inputs, self._loss)
        objective = total_loss(pairs, self._loss)
        loss = objective.loss
        if not self.model.training and 0 < (real := self._real_pairs(batch.num_pairs)) < batch.num_pairs:
            loss = total_loss(first_pairs(pairs, real), self._loss).loss
        if scores.aux_loss is not None:
            loss = loss + self._balance_weight * scores.aux_loss
        self._add_metrics(columns_of(batch, scores, inputs, pairs, objective))
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
            logs.update({f"{prefix}{name}": value for name, value in averages_of(totals).items()})
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


def _start_worker(closing: Any, seed: Callable[[int], None] | None, worker: int) -> None:
    work_unsignalled(closing)
    if seed is not None:
        seed(worker)
