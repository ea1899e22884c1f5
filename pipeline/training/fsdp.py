"""What FSDP2 spreads over processes, whole again for a checkpoint: the policy's weights and the optimizer's state.

Weights are always saved whole, in the form that `from_pretrained` reads, so that every checkpoint is a model. The
optimizer's state is in one of two forms, and each can be gone on from by any number of processes, sharded or not:
whole, as the library saves it without FSDP; or each process's share of it in a file of its own, which no process has
to hold the whole of. Torch's own format for shares (DCP) is not used: reading it runs the pickles that are in it.

All of this must be called by all processes at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pipeline.base.errors import DataError

__all__ = [
    "load_optimizer",
    "name_plugin",
    "put_weights",
    "save_optimizer",
    "whole_weights",
]

WHOLE, SHARE = "optimizer.pt", "optimizer-{:05d}-of-{:05d}.pt"


def name_plugin(state: Any, plugin_settings: Mapping[str, Any]) -> None:
    """Have accelerate's state name FSDP on processes of CPUs: there accelerate would take it for DDP without a word.

    Args:
        state: Of the accelerator, an `AcceleratorState`.
        plugin_settings: What `TrainingArguments` made of `fsdp_config`.
    """
    if state.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**plugin_settings)
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def whole_weights(model: Any, *, trained_only: bool) -> dict[str, torch.Tensor]:
    """Give the weights of a sharded model in the main process's memory; in the others, nothing.

    Args:
        model: Sharded by FSDP2.
        trained_only: Leave out what is frozen: an adapter's base.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    # Tied weights come once for each of their names, and `from_pretrained` ties them itself.
    named: dict[torch.nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if named.setdefault(parameter, name) != name:
            weights.pop(name, None)
    return weights


def put_weights(model: Any, weights: Mapping[str, torch.Tensor], *, trained_only: bool) -> None:
    """Give a sharded model the weights that the main process has of it in one piece.

    Args:
        model: Sharded by FSDP2.
        weights: The main process's, by the names that they have in the model; of the others, nothing is looked at.
        trained_only: What is frozen is not among them, and stays.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=not trained_only)
    set_model_state_dict(model, dict(weights), options=options)


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path, rank: int, processes: int, *, whole: bool) -> None:
    """Save the optimizer's state: whole by the main process, or by each process what it holds.

    Args:
        optimizer: Of a model that FSDP2 has sharded.
        folder: The checkpoint's.
        rank: This process.
        processes: How many there are.
        whole: Bring all of it together, tensor by tensor, in the main process's memory.
    """
    saved = optimizer.state_dict()
    # Two processes by two nodes and the like: what one of them holds is no slice of rows.
    whole = whole or any(not _is_sliced(value) for _, _, value in _sharded(saved))
    cut = [] if whole else [[index, name] for index, name, _ in _sharded(saved)]
    state: dict[int, dict[str, Any]] = {}
    # In one order everywhere, since bringing a tensor together takes all processes.
    for index in sorted(saved["state"]):
        state[index] = {name: _piece(value, whole, rank) for name, value in sorted(saved["state"][index].items())}
    # The main process may not have come as far yet.
    folder.mkdir(parents=True, exist_ok=True)
    if not whole:
        torch.save({**saved, "state": state, "cut": cut}, folder / SHARE.format(rank, processes))
    elif rank == 0:
        torch.save({**saved, "state": state}, folder / WHOLE)


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load an optimizer's state in whichever form it was saved, into an optimizer that may be sharded or not.

    Raises:
        DataError: It is not there, or not all of it.
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
        raise DataError(f"{file.parent}: {file.name} is missing, so that the run can't go on as if it never stopped")
    # Mapped: of the other processes' shares, only what is put together next is read.
    read: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return read


def _sharded(saved: Mapping[str, Any]) -> list[tuple[int, str, DTensor]]:
    """The tensors of an optimizer's state that are spread over processes, with their parameter and name."""
    return [
        (index, name, value)
        for index, values in saved["state"].items()
        for name, value in values.items()
        if isinstance(value, DTensor)
    ]


def _is_sliced(tensor: DTensor) -> bool:
    return tensor.device_mesh.ndim == 1 and tuple(tensor.placements) == (Shard(0),)


def _piece(value: Any, whole: bool, rank: int) -> Any:
    if isinstance(value, DTensor):
        if not whole:
            return value.to_local().cpu()
        value = value.full_tensor()
        # The other processes are done with it.
        return value.cpu() if rank == 0 else None
    return value


def _spread(value: Any, parameter: torch.Tensor) -> Any:
    """Give this process its part of a whole tensor of the optimizer's state; a single number is everybody's."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.ndim == 0 or not isinstance(parameter, DTensor):
        # A copy, since what is mapped would keep hold of the file, which NFS then can't delete with its checkpoint.
        return value.clone()
    mesh = parameter.device_mesh
    # Statistics of another shape than their parameter's (Adafactor's rows and columns) are small.
    placements = parameter.placements if value.shape == parameter.shape else [Replicate()] * mesh.ndim
    part = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()
    # A copy, since it is a view, which would keep all of the tensor in memory.
    return DTensor.from_local(part.clone(), mesh, placements, run_check=False, shape=value.shape, stride=value.stride())
