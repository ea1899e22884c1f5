"""Save and load what FSDP2 shards over processes: the policy's weights and the optimizer's state.

Weights are always saved whole, as `from_pretrained` reads them, so every checkpoint is a model. The optimizer's state
has two forms: whole, as the library saves it without FSDP; or a file for each process's share, so that no process
holds all of it. Any number of processes, sharded or not, can resume from either. Torch's own format for shares (DCP)
is not used, as reading it runs the pickles in it.

All processes must call these functions together.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pipeline.base.errors import ConfigError, DataError, one_line

__all__ = [
    "keep_outputs",
    "load_optimizer",
    "name_plugin",
    "put_weights",
    "save_optimizer",
    "shard_exactly",
    "tied_names",
    "whole_weights",
]

WHOLE, SHARE = "optimizer.pt", "optimizer-{:05d}-of-{:05d}.pt"


def name_plugin(state: Any, plugin_settings: Mapping[str, Any]) -> None:
    """Set FSDP in accelerate's `AcceleratorState` on processes of CPUs, where accelerate silently uses DDP."""
    if state.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**plugin_settings)
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def keep_outputs(plugin: Any) -> None:
    """Let mixed precision round the weights alone: a forward's log-probs stay float32, which accelerate would cast."""
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


def shard_exactly(accelerator: Any) -> None:
    """Let accelerate's sharding keep buffers whole, and refuse a policy that it would change or can't shard.

    Where it hands on the main process's weights, it takes saved buffers for shards. Every process has them already. It
    ties the head anew, and would tie it to an adapter's own embedding.
    """
    # Its plugin has just asked the library to leave weights out of every model that other processes read from now on.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    prepare = accelerator.prepare

    def prepared(*args: Any, **kwargs: Any) -> Any:
        models = [each for each in args if isinstance(each, torch.nn.Module)]
        modules = [module for model in models for module in model.modules()]
        saved = [(m, name) for m in modules for name in m._buffers.keys() - m._non_persistent_buffers_set]
        before = [tied_names(model) for model in models]
        for module, name in saved:
            module._non_persistent_buffers_set.add(name)
        try:
            result = prepare(*args, **kwargs)
        except ValueError as error:
            raise ConfigError(
                f"train.fsdp: must be off for a policy that can't be sharded so ({one_line(str(error))}), got on. Set "
                "train.fsdp_config or policy otherwise"
            ) from error
        finally:
            for module, name in saved:
                module._non_persistent_buffers_set.discard(name)
        if [tied_names(model) for model in models] != before:
            raise ConfigError(
                "train.fsdp: must be off for an adapter that trains a tied embedding, as sharding would tie the head "
                "to it, got on. Take the embedding out of modules_to_save"
            )
        return result

    accelerator.prepare = prepared


def tied_names(model: torch.nn.Module) -> set[frozenset[str]]:
    """Give the names of each parameter that has several, without what wrappers put into them."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        names.setdefault(id(parameter), set()).add(plain)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def whole_weights(model: Any, *, trained_only: bool) -> dict[str, torch.Tensor]:
    """Gather the weights of a model that FSDP2 has sharded, in the main process's memory; in others, nothing.

    `trained_only` leaves out frozen weights, such as an adapter's base.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    # Tied weights come under each of their names. `from_pretrained` ties them itself.
    named: dict[torch.nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if named.setdefault(parameter, name) != name:
            weights.pop(name, None)
    return weights


def put_weights(model: Any, weights: Mapping[str, torch.Tensor], *, trained_only: bool) -> None:
    """Load whole weights of the main process, by name, into a model that FSDP2 has sharded.

    With `trained_only`, the weights hold no frozen ones, which stay as they are.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=not trained_only)
    set_model_state_dict(model, dict(weights), options=options)


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path, rank: int, processes: int, *, whole: bool) -> None:
    """Save the state of a sharded model's optimizer: each process its share, or `whole` by the main process.

    The whole state is gathered tensor by tensor in the main process's memory.
    """
    saved = optimizer.state_dict()
    sharded = {
        (index, name): value
        for index, values in saved["state"].items()
        for name, value in values.items()
        if isinstance(value, DTensor)
    }
    # On a mesh of two dimensions (hybrid sharding), a share is not a slice of rows.
    whole = whole or any(t.device_mesh.ndim != 1 or tuple(t.placements) != (Shard(0),) for t in sharded.values())
    state: dict[int, dict[str, Any]] = {}
    # All processes gather a tensor together, so they need the same order.
    for index in sorted(saved["state"]):
        state[index] = {name: _piece(value, whole, rank) for name, value in sorted(saved["state"][index].items())}
    # The main process may not have made it yet.
    folder.mkdir(parents=True, exist_ok=True)
    if not whole:
        torch.save(
            {**saved, "state": state, "cut": [list(key) for key in sharded]}, folder / SHARE.format(rank, processes)
        )
    elif rank == 0:
        torch.save({**saved, "state": state}, folder / WHOLE)


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load a state, saved in either form, into an optimizer that may be sharded or not.

    Raises DataError if a file is missing.
    """
    shares = sorted(folder.glob("optimizer-*-of-*.pt"))
    if not shares:
        saved = _read(folder / WHOLE)
    else:
        named = {file.name for file in shares}
        processes = int(shares[0].stem.rpartition("-")[2])
        missing = sorted({SHARE.format(rank, processes) for rank in range(processes)} - named)
        if missing:
            raise DataError(f"{folder}: {missing[0]} is missing, a share of the optimizer's state")
        parts = [_read(file) for file in shares]
        cut = {(index, name) for index, name in parts[0].pop("cut")}
        saved = parts[0]
        for index, values in saved["state"].items():
            for name in values:
                pieces = [part["state"][index][name] for part in parts]
                values[name] = torch.cat(pieces) if (index, name) in cut else pieces[0]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in saved["state"].items():
        parameter = parameters[index]
        saved["state"][index] = {name: _spread(value, parameter) for name, value in values.items()}
    optimizer.load_state_dict(saved)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise DataError(f"{file.parent}: {file.name} is missing, so the run can't resume exactly")
    # Memory-mapped: shares of other processes are read tensor by tensor.
    read: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return read


def _piece(value: Any, whole: bool, rank: int) -> Any:
    if not isinstance(value, DTensor):
        return value
    if not whole:
        return value.to_local().cpu()
    gathered = value.full_tensor()
    # Only the main process saves it.
    return gathered.cpu() if rank == 0 else None


def _spread(value: Any, parameter: torch.Tensor) -> Any:
    """Give this process its share of a whole tensor of the optimizer's state; scalars are replicated."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.ndim == 0 or not isinstance(parameter, DTensor):
        # Copy, as a memory map keeps the file open, and NFS then can't delete its checkpoint.
        return value.clone()
    mesh = parameter.device_mesh
    # Statistics of another shape than their parameter (Adafactor's rows and columns) are small.
    placements = parameter.placements if value.shape == parameter.shape else [Replicate()] * mesh.ndim
    part = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()
    # Copy, as a view keeps the whole tensor in memory.
    return DTensor.from_local(part.clone(), mesh, placements, run_check=False, shape=value.shape, stride=value.stride())
