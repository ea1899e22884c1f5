"""TRL's side: its DPOTrainer, given the same token ids."""

import tempfile
from typing import Any

import datasets
import transformers
import trl.trainer.utils
from gauge import Gauge
from model import build_model
from outcome import Outcome, StepClock, lora_config, step_arguments
from tokenizers import Tokenizer, models
from trl import DPOConfig, DPOTrainer
from workloads import Workload, make_pairs, reference_logps

_SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}


def score_completions_only() -> None:
    """Let TRL project only the completions' positions through its head, as it does on CUDA.

    Elsewhere it projects every position, prompts and padding too, and masks the others afterwards. It decides by what
    `_use_triton` says of the device; its kernels ask a function of the same name in their own module, which stays.
    """
    if not callable(getattr(trl.trainer.utils, "_use_triton", None)):
        raise RuntimeError("this version of TRL no longer chooses its head's positions by _use_triton")
    trl.trainer.utils._use_triton = lambda device: True


class _OnIds(DPOTrainer):
    """Takes a dataset that is tokenized already."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class _ReadsColumns(_OnIds):
    """Finds the reference log-probs in the dataset."""

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class _Clocked(_OnIds):
    """Clocks its own precomputation: the loader and the passes of the model, not the writing of its cache."""

    gauge: Gauge

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self.gauge.watch()
        # The whole way once, so that nothing of it is done for the first time under the clock.
        super()._precompute_ref_logps(dataset.select(range(2)), name, batch_size)
        self.gauge.start()
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        sums = super().compute_ref_log_probs(*args, **kwargs)
        self.gauge.stop()
        return sums


def run_stage_one(workload: Workload, count: int) -> Outcome:
    columns = zip(*make_pairs(workload, count), strict=True)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = datasets.Dataset.from_dict(dict(zip(names, columns, strict=True)))
    _Clocked.gauge = Gauge(workload.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Clocked(
            model=build_model(workload),
            args=DPOConfig(
                output_dir=folder,
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=workload.peer_batch,
                max_length=workload.lengths.max_length,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=workload.device == "cpu",
                dataloader_pin_memory=workload.device != "cpu",
                report_to="none",
            ),
            train_dataset=rows,
            processing_class=_tokenizer(),
        )
    reading = _Clocked.gauge.read()
    scored = trainer.train_dataset
    return Outcome(reading, [*scored["ref_chosen_logps"], *scored["ref_rejected_logps"]])


def run_stage_two(workload: Workload, count: int, *, live: bool) -> Outcome:
    """Train a few steps.

    Args:
        workload: What to train.
        count: Pairs of all steps.
        live: Keep the reference in memory (with an adapter: switch it off for a second pass), not in columns.
    """
    pairs = make_pairs(workload, count)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    columns: dict[str, Any] = dict(zip(names, zip(*pairs, strict=True), strict=True))
    if not live:
        columns["ref_chosen_logps"], columns["ref_rejected_logps"] = zip(*reference_logps(workload, pairs), strict=True)
    gauge = Gauge(workload.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = (_OnIds if live else _ReadsColumns)(
            model=build_model(workload),
            ref_model=build_model(workload) if live and not workload.lora else None,
            args=DPOConfig(
                **step_arguments(workload, count, folder),
                precompute_ref_log_probs=not live,
                max_length=workload.lengths.max_length,
            ),
            train_dataset=datasets.Dataset.from_dict(columns),
            processing_class=_tokenizer(),
            peft_config=lora_config() if workload.lora else None,
            callbacks=[StepClock(gauge)],
        )
        trainer.train()
    first = trainer.state.log_history[0]
    return Outcome(gauge.read(), [first["loss"], first["grad_norm"]])


def _tokenizer() -> Any:
    """TRL asks for one, and takes the padding id from it."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(_SPECIAL, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
