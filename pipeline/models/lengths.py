"""Find up to which length a model scores sequences rightly, and refuse longer ones by the setting `data.max_length`."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.base.errors import ConfigError
from pipeline.config.schema import Config
from pipeline.models.files import model_settings

__all__ = [
    "check_max_length",
    "exact_length",
    "exact_length_of_reference",
    "length_error",
    "most_positions",
    "positions_of",
]


def exact_length(model_config: Any) -> int | None:
    """Give the length up to which a model scores a sequence as if it were alone; None if it always does.

    If a batch holds a longer row, longrope and dynamic NTK take other frequencies for all its rows, and Doge chooses
    other keys among equal ones. So the log-probs of a longer sequence's prefix are not the prefix's own either.
    """
    settings = model_config.to_dict()
    lengths = [settings.get("keep_window_size")]
    for rotary in _rotary_settings(settings):
        kind = str(rotary.get("rope_type") or rotary.get("type"))
        if kind == "longrope":
            named = (found.get("original_max_position_embeddings") for found in (rotary, settings))
            lengths.append(next(filter(None, named), settings.get("max_position_embeddings")))
        elif "dynamic" in kind:
            lengths.append(settings.get("max_position_embeddings"))
    return min(filter(None, lengths), default=None)


def _rotary_settings(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of rotary positions: one for all layers, or one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        rotary = settings.get(name) or {}
        yield rotary
        yield from (value for value in rotary.values() if isinstance(value, Mapping))


def exact_length_of_reference(config: Config) -> int | None:
    """Give the `exact_length` of the run's reference; None if it is known by name alone. Reads no weights."""
    return None if config.reference.declared is not None else exact_length(model_settings(config)[1])


def check_max_length(config: Config) -> None:
    """Refuse a `data.max_length` above what policy and reference score exactly. Reads no weights."""
    most = config.data.max_length
    for key, model_config in _models(config):
        exact = exact_length(model_config)
        if exact is not None and (most is None or most > exact):
            raise ConfigError(
                f"data.max_length: must be at most {exact} for {key}: one longer sequence changes how "
                f"{model_config.model_type} scores all others of its batch, got {most}. Set data.max_length: {exact}"
            )


def most_positions(config: Config) -> tuple[int, str] | None:
    """Give the number of positions that policy and reference have both, and the key of the model with fewer.

    None if any length has positions. Reads no weights.
    """
    from pipeline.models.loading import empty_model

    found = []
    for key, model_config in _models(config):
        # Rotary positions are computed, and have no end.
        if not getattr(model_config, "rope_parameters", None):
            found.append((positions_of(empty_model(model_config)[0]), key))
    return min(((positions, key) for positions, key in found if positions is not None), default=None)


def positions_of(model: Any) -> int | None:
    """Give the number of positions in a model's tables: learned ones, or sines made once; None without a table."""
    import torch

    sizes = [
        len(module.weight) - getattr(module, "offset", 0)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and _is_of_positions(name)
    ]
    sizes += [len(table) for name, table in model.named_buffers() if table.ndim == 2 and _is_of_positions(name)]
    # MPT's biases by distance.
    sizes += [size for size in [getattr(model.config.get_text_config(), "max_seq_len", None)] if size is not None]
    return min(sizes, default=None)


def _is_of_positions(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "wpe" or (last.startswith(("pos", "embed_pos")) and last != "position_ids")


def length_error(limit: tuple[int, str] | None, length: int, place: str, config: Config) -> ConfigError | None:
    """Make the error for a pair whose longer sequence has more tokens than there are `most_positions`."""
    if limit is None or length <= limit[0]:
        return None
    most, key = limit
    return ConfigError(
        f"data.max_length: must be at most {most}, the positions of {key}, for {place} with {length} tokens, got "
        f"{config.data.max_length}. Set data.max_length: {most}"
    )


def _models(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield key and text config of the models that score the run's pairs."""
    policy, reference = model_settings(config)
    if reference is policy or not config.train.is_empty:
        yield "policy.model", policy
    if reference is not policy:
        yield "reference.model", reference
