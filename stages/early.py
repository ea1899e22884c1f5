"""Refuse what settings and folders alone show to be wrong, before the libraries load, which takes seconds."""

import os
from pathlib import Path

from pipeline.base.errors import ConfigError
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from pipeline.data.sources import open_source
from pipeline.models.files import NamedModel, reference_sources
from pipeline.run.checkpoints import is_recorded, newest_identity
from pipeline.run.identity import check_same_run, with_settings_of
from pipeline.run.outputs import guard_run, guard_shards
from pipeline.run.reading import SETTINGS, read_record
from pipeline.store.serving import open_stores

__all__ = ["is_launched", "refuse_early", "refuse_other_settings", "settings_of_run"]

_NUMBERS_OF_PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which the libraries know how many processes were launched"""


def is_launched() -> bool:
    """Return True if a launcher has started this process, which may be one of several."""
    several = any(os.environ.get(name, "1") != "1" for name in _NUMBERS_OF_PROCESSES)
    return several or any(name.startswith("ACCELERATE_") for name in os.environ)


def refuse_early(config: Config, *, is_scored: bool = False) -> None:
    """Refuse wrong fields of `train`, and data, models and outputs that can't be what they should be. Ask no hub.

    Raises:
        ConfigError: A setting is wrong.
        DataError: Stage one should be done (`is_scored`), and a set has no store.
        UnfinishedError: Stage one should be done, and a store lacks parts.
    """
    guard_shards(config)
    if not config.train.is_empty:
        _ = config.train.options
        guard_run(config)
    for name in config.data.names:
        open_source(config.data, name)
    models = [NamedModel.policy(config)]
    if config.reference.model is not None:
        models.append(reference_sources(config)[0])
    for model in models:
        if not model.is_on_hub:
            model.folder(weights=False)
    # With `reference.sync`, stage two has each window scored.
    if is_scored and config.reference.sync is None and config.loss.needs_reference:
        open_stores(config, config.data.names)


def refuse_other_settings(config: Config, processes: int) -> None:
    """Refuse a loss, training options or an adapter other than those of the run that is saved in `train.output_dir`.

    The full command compares everything, and alone knows the number of processes that others have launched.

    Raises:
        IdentityError: A setting differs; each is named.
    """
    if config.train.is_empty or is_launched():
        return
    output = config.train.folder
    saved = (output, read_record(output).get("identity", {})) if is_recorded(output) else newest_identity(output)
    place, identity = saved or (output, {})
    if isinstance(identity.get("policy"), dict):
        check_same_run(place, identity, with_settings_of(identity, config, processes))


def settings_of_run(run_folder: Path, set_name: str | None = None) -> Config:
    """Read the settings of a run that is to draw replies. Raises ConfigError for another folder, or an unknown set."""
    file = run_folder / SETTINGS
    if not file.exists():
        raise ConfigError(f"{run_folder}: must be a run's folder, got one without {SETTINGS}. Name a train.output_dir")
    config = load_config(file)
    if config.reference.declared is not None:
        raise ConfigError(
            f"{run_folder}: must have a reference that can draw replies, got the name of one alone "
            f"(reference.declared: {config.reference.declared}). Choose another run"
        )
    config.data.of(set_name or config.data.training[0])  # refuses an unknown name
    return config
