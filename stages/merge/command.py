"""Write the policy of a finished run with an adapter as one plain model, and show that it scores as the run's does."""

import dataclasses
import shutil
import uuid
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.base.errors import ConfigError, DataError, IdentityError, UnfinishedError, number_of
from pipeline.base.files import read_file, storage_errors, sync_tree
from pipeline.base.progress import say, say_loading, without_other_bars
from pipeline.config.reader import load_config
from pipeline.config.schema import Config, ReferenceConfig
from pipeline.data.intake import KeptPair, Ledger, kept_pairs
from pipeline.data.sources import open_source, read_rows
from pipeline.models.files import NamedModel, find_adapter, in_one_process, load_tokenizer, policy_as_reference
from pipeline.models.identity import differing_fields
from pipeline.models.merging import dtype_of_base, load_merged
from pipeline.models.precision import Precision, policy_precision
from pipeline.run.card import merged_card
from pipeline.run.checkpoints import checkpoint_folders, is_recorded
from pipeline.run.identity import identity_of_base
from pipeline.run.outputs import guard_output
from pipeline.run.reading import SETTINGS, part, read_record
from pipeline.scoring.agreement import Agreement, NoiseFloor, allowed_gap, compare

__all__ = ["run"]

_Logps = Mapping[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]
"""Pair -> token logps of its chosen and its rejected completion"""
_SHARD = "5GB"
"""Largest weight file, as the hub takes it well; libraries have had other defaults"""


def run(run_folder: Path, output: Path, *, dtype: str = "auto", sample: int = 8) -> None:
    """Merge the run's adapter into its base, save the model with tokenizer and card, and compare both models' scores.

    The folder gets its name last, so it is whole or absent.

    Args:
        run_folder: Folder of a finished run, its `train.output_dir`.
        output: New folder of the merged model.
        dtype: Dtype of its weights; `auto` takes that of the base's checkpoint.
        sample: Number of the run's pairs that both models score; 0 for none.

    Raises:
        ConfigError: The folder is not that of a run with an adapter, or its base can't be merged into.
        DataError: The output exists, or the merged model's log-probs are other ones.
        IdentityError: The base is not the one that the adapter was trained on.
        UnfinishedError: The run is not finished.
    """
    config = _settings(run_folder)
    if output.exists() or output.is_symlink():
        raise DataError(f"{output}: must be a new folder, it exists already. Name another one")
    guard_output("OUT", output, config)
    _check_base(config, run_folder)
    say_loading()
    config = in_one_process(config)
    dtype = dtype_of_base(config) if dtype == "auto" else dtype
    work = output.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        # Before a model is loaded, which can take long.
        with storage_errors(output):
            work.mkdir(parents=True)
        tokenizer = load_tokenizer(config)
        pairs = _sample(config, tokenizer, sample)
        unmerged = _logps(policy_as_reference(config, run_folder).reference, config, tokenizer, pairs)
        _save(config, run_folder, work, dtype, tokenizer)
        merged = _logps(ReferenceConfig(model=str(work)), config, tokenizer, pairs)
        found = _compared(unmerged, merged, config, dtype)
        if found is not None:
            if not found.agrees:
                remedy = "Load the adapter with PEFT instead" if dtype == "float32" else "Choose --dtype float32"
                raise DataError(
                    f"{output}: must score as the run's policy, got other log-probs: {found}. Nothing was written. "
                    f"{remedy}"
                )
            say(f"{number_of(len(pairs), 'pair')} scored by both models: {found}")
        _write_card(config, run_folder, work, dtype, found)
        sync_tree(work)
        with storage_errors(output):
            work.rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    size = sum(file.stat().st_size for file in output.iterdir())
    say(f"The merged model is in {output} ({dtype}, {size / 1e6:,.1f} MB); from_pretrained loads it")


def _settings(run_folder: Path) -> Config:
    """Read the settings of a finished run with an adapter."""
    file = run_folder / SETTINGS
    if not file.exists():
        parent = run_folder.resolve().parent
        is_checkpoint = run_folder.resolve() in checkpoint_folders(parent).values()
        found, remedy = f"one without {SETTINGS}", "Name a train.output_dir"
        if is_checkpoint and (parent / SETTINGS).exists():
            found, remedy = "a checkpoint of one", f"Name the run, {parent}"
        raise ConfigError(f"{run_folder}: must be a run's folder, got {found}. {remedy}")
    config = load_config(file)
    if not config.policy.has_adapter:
        raise ConfigError(
            f"{run_folder}: must be a run that trains an adapter, got one that trains all weights, which has nothing "
            "to merge. Load its folder with from_pretrained, with any dtype"
        )
    if not is_recorded(run_folder):
        raise UnfinishedError(f"{run_folder}: must be finished, got a run that is not. Run: refshard train")
    find_adapter(str(run_folder), "RUN")
    return config


def _check_base(config: Config, run_folder: Path) -> None:
    # Earlier versions did not record it.
    stored = part(read_record(run_folder), "identity", "policy_base")
    found = [field for field, _, _ in differing_fields(stored, identity_of_base(config))] if stored else []
    if found:
        raise IdentityError(
            f"{run_folder}: its base, {config.policy.model}, must be the one that the adapter was trained on, got "
            f"another {', '.join(found)}. Restore that model"
        )


def _sample(config: Config, tokenizer: Any, count: int) -> list[KeptPair]:
    """Take the first pairs of the first held-out set, or else of the first training set."""
    name = next(iter((*config.data.eval, *config.data.training)))
    rows = read_rows(open_source(config.data, name)) if count else iter(())
    return list(islice(kept_pairs(rows, tokenizer, config.data.of(name), Ledger()), count))


def _logps(model: ReferenceConfig, config: Config, tokenizer: Any, pairs: list[KeptPair]) -> _Logps:
    """Score pairs with a model in the policy's dtype, without autocast, whose rounding would hide that of the merge."""
    from pipeline.scoring.scorer import load_scorer

    if not pairs:
        return {}
    dtype: Any = policy_precision(config).weights
    config = dataclasses.replace(config, reference=dataclasses.replace(model, dtype=dtype))
    with without_other_bars(), load_scorer(config, tokenizer, "RUN", tokens_per_batch=2048) as scorer:
        return {i: (chosen, rejected) for i, chosen, rejected in scorer.logps([pair.pair for pair in pairs])}


def _compared(unmerged: _Logps, merged: _Logps, config: Config, dtype: str) -> Agreement | None:
    """Compare both models' token logps; None without any."""
    if not unmerged:
        return None
    coarsest = min((policy_precision(config).weights, dtype), key=lambda name: Precision(weights=name).bits)
    quantization = config.policy.quantization
    allowed = allowed_gap(NoiseFloor(), coarsest, in_8_bits=quantization is not None and quantization.bits == 8)
    sides = ((merged[i][side], logps[side]) for i, logps in unmerged.items() for side in (0, 1))
    return compare([np.subtract(after, before, dtype=np.float64) for after, before in sides], allowed)


def _save(config: Config, run_folder: Path, work: Path, dtype: str, tokenizer: Any) -> None:
    """Save the merged model as `from_pretrained` reads it, with its generation config and the tokenizer."""
    from pipeline.scoring.memory import free_memory
    from pipeline.training.trainer import saving

    say(f"Merging the adapter into {NamedModel.policy(config).name}, in {dtype} ...")
    with without_other_bars():
        model = load_merged(config, run_folder, dtype)
    with without_other_bars(), saving(f"{work}: the merged model"):
        model.save_pretrained(work, max_shard_size=_SHARD)
        tokenizer.save_pretrained(work)
    del model
    free_memory()


def _write_card(config: Config, run_folder: Path, work: Path, dtype: str, found: Agreement | None) -> None:
    file = run_folder / "README.md"
    card = read_file(file, most=2**24).decode(errors="replace") if file.exists() else f"# {run_folder.resolve().name}\n"
    text = merged_card(card, base=config.policy.model, dtype=dtype, compared=None if found is None else str(found))
    with storage_errors(work):
        (work / "README.md").write_text(text, encoding="utf-8")
