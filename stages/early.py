"""Refuse what settings and folders alone show to be wrong, before the libraries load, which takes seconds."""

from pipeline.config.schema import Config
from pipeline.data.sources import open_source
from pipeline.models.files import NamedModel, reference_sources
from pipeline.run.outputs import guard_run, guard_shards

__all__ = ["refuse_early"]


def refuse_early(config: Config, *, outputs: bool = True) -> None:
    """Refuse wrong fields of `train`, and data, models and outputs that can't be what they should be.

    It asks no hub. Without `outputs`, the folders of the run are not looked at.

    Raises:
        ConfigError: The setting, as the command itself would refuse it.
    """
    if outputs:
        guard_shards(config)
    if not config.train.is_empty:
        _ = config.train.options
        if outputs:
            guard_run(config)
    for name in config.data.sets:
        open_source(config.data, name)
    models = [NamedModel.policy(config)]
    if config.reference.model is not None:
        models.append(reference_sources(config)[0])
    for model in models:
        if not model.is_on_hub:
            model.folder(weights=False)
