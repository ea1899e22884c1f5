"""What both sides share: the settings of a training step, its clock, and the form of a result."""

from dataclasses import dataclass
from typing import Any

from gauge import Gauge, Reading
from transformers import TrainerCallback
from workloads import SEED, Workload


@dataclass(frozen=True)
class Outcome:
    """One measurement of one side."""

    reading: Reading
    values: list[float]
    """Stage one: summed log-probs of all chosen, then of all rejected completions. Stage two: loss and gradient norm
    of the first step"""


class StepClock(TrainerCallback):
    """Starts the clocks when the first step has ended, and stops them at the end of each one after it.

    From end to end, so a step has everything in it: collating, forward, backward, optimizer, logging.
    """

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._gauge.watch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self._gauge.start()
        self._gauge.stop()


def step_arguments(workload: Workload, count: int, folder: str) -> dict[str, Any]:
    """Give the training arguments, alike for both trainers.

    SGD, because what AdamW keeps and does is the same on either side, and would only blur the ratios.
    """
    return {
        "output_dir": folder,
        "per_device_train_batch_size": workload.batch,
        "max_steps": count // workload.batch,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": SEED,
        "bf16": workload.is_autocast,
        "gradient_checkpointing": workload.checkpointing,
        "use_cpu": workload.device == "cpu",
        "dataloader_pin_memory": workload.device != "cpu",
        "disable_tqdm": True,
        "report_to": "none",
    }


def lora_config() -> Any:
    # A GPU machine may lack the library, which stage one does without.
    import peft

    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )


def add_adapter(model: Any) -> Any:
    import peft

    return peft.get_peft_model(model, lora_config())
