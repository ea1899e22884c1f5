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
from pipeline.scoring.forward import score
from pipeline.training.batches import JoinedBatch
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
        before_training: Called with the trainer once all is ready for the first step.
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
        before_training: Callable[["PairTrainer"], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.add_callback(_BeforeTraining(self, before_training))
        self._first_step = 0
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
        joined = cast(JoinedBatch, inputs["joined"]).to(self.args.device)
        batch = joined.batch
        if not torch.isfinite(joined.ref_chosen_logps + joined.ref_rejected_logps).all():
            raise DataError("a pair without reference logps came up for training; nothing unscored is read as a number")
        with self._offload if self._offload and torch.is_grad_enabled() else nullcontext():
            scores = score(model, batch, squares=self._loss.use_weighting, aux_loss=self._balance_weight != 0)
        pairs = pairs_of(scores, joined, self._loss)
        objective = total_loss(pairs, self._loss)
        loss = objective.loss
        if not self.model.training and 0 < (real := self._real_pairs(batch.num_pairs)) < batch.num_pairs:
            loss = total_loss(first_pairs(pairs, real), self._loss).loss
        if scores.aux_loss is not None:
            loss = loss + self._balance_weight * scores.aux_loss
        self._add_metrics(columns_of(joined, scores, pairs, objective))
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
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # The library counts by the ids that went in.
        return int(super().floating_point_ops({"input_ids": inputs["joined"].batch.input_ids}))

    def get_train_dataloader(self) -> Any:
        return self._unsignalled(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._unsignalled(super().get_eval_dataloader(eval_dataset))

    def _unsignalled(self, loader: Any) -> Any:
        """Have the loader's workers ignore the signals that the run gets."""
        # The one that has the workers is inside of accelerate's, and is kept between evaluations if they persist.
        inner = getattr(loader, "base_dataloader", loader)
        if getattr(inner.worker_init_fn, "func", None) is not _start_worker:
            inner.worker_init_fn = functools.partial(_start_worker, self._closing, inner.worker_init_fn)
        return loader

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        # Loaders draw a seed when they start. Training's random numbers must not depend on how often it is measured.
        with torch.random.fork_rng(devices=gpus_of(self)):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self._margins is not None:
            self._margins.finish_set(metric_key_prefix, self.state.global_step)
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

    def leave(self, *, save: bool) -> None:
        """End training where an evaluation was left."""
        self.forget_evaluation()
        if not self.is_in_train:
            return
        if save and self.state.global_step > self._first_step:
            # The control, in which the evaluation is due still, is saved with the checkpoint.
            self.save_checkpoint()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        def make_way(folder: Path) -> None:
            self._check_owner()
            if folder.exists():
                # Of a start that this one has taken over from: its files and ours must never be in one folder.
                set_aside(folder)

        on_main_process(lambda: make_way(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"))
        with saving(f"{self.args.output_dir}: the checkpoint of step {self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        # The library would save no model at all where FSDP saves the state in shares. And where all steps were done at
        # the start, DeepSpeed was never begun: the policy is in one piece.
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
            # A pickle of the arguments, access tokens included. Nothing here reads it; refshard.yaml has the settings.
            (folder / "training_args.bin").unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # A process that was stopped while it saved may come back when another start has made a folder of the same
        # name. Every process has files of its own to save, this and its random state, so it looks before each.
        self._check_owner()
        if self.is_fsdp_enabled:
            folder, whole = Path(output_dir), not self._saves_shares
            save_optimizer(self._inner_optimizer, folder, self.args.process_index, self.args.world_size, whole=whole)
            if self.args.should_save:
                assert self.lr_scheduler is not None
                torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        self._check_owner()

    @property
    def _saves_shares(self) -> bool:
        return "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        return cast(torch.optim.Optimizer, getattr(optimizer, "optimizer", optimizer))  # accelerate's is around it

    def _check_owner(self) -> None:
        if self._attempt is not None:
            self._attempt.check()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing where the library would load the weights: the policy was loaded from the checkpoint.

        `from_pretrained` knows all that a saved folder may be; this method of the library warns of weights that it
        does not find, and knows nothing of what is renamed or merged when a model is loaded. DeepSpeed, which loads
        weights in a form of its own, does not come here.
        """

    def load_best(self) -> None:
        """Give the policy the weights of the run's best checkpoint."""
        if not self.is_fsdp_enabled:
            self._load_best_model()
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


def gpus_of(trainer: transformers.Trainer) -> list[torch.device]:
    """Give the devices whose random state an evaluation must leave as it is, beside the CPU's."""
    device = trainer.args.device
    return [device] if device.type == "cuda" else []


class _BeforeTraining(transformers.TrainerCallback):
    def __init__(self, trainer: PairTrainer, action: Callable[[PairTrainer], None] | None) -> None:
        self._trainer = trainer
        self._action = action

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._first_step = state.global_step
        if self._action is not None:
            self._action(self._trainer)


def _start_worker(closing: Any, seed: Callable[[int], None] | None, worker: int) -> None:
    work_unsignalled(closing)
    if seed is not None:
        seed(worker)
