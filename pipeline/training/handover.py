"""Load the policy in the main process alone, for FSDP2 to hand its weights on, so that a machine holds one copy.

The other processes get all but the weights: the config, how the policy reads batches, buffers. Their parameters are
memory that is never touched, until accelerate gives each process its share of the main process's.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from pipeline.base.errors import ConfigError, one_line
from pipeline.config.schema import PolicyConfig
from pipeline.models.loading import policy_without_weights
from pipeline.models.parts import causal_of
from pipeline.scoring.packing import Reading
from pipeline.scoring.scorer import Scorer
from pipeline.training.fsdp import tied_names
from pipeline.training.processes import largest, on_main_process

__all__ = ["load_in_main_process"]


@dataclass(frozen=True, kw_only=True)
class _Outline:
    """All of a loaded policy but its weights."""

    model_config: Any
    parameters: Mapping[str, tuple[torch.Size, torch.dtype, bool]]
    """Shape, dtype and `requires_grad` by name; tied ones under each of their names"""
    ties: set[frozenset[str]]
    """Names of each tied parameter: the config may tie a head that has weights of its own in the files"""
    tensors: Mapping[tuple[str, str], torch.Tensor]
    """Buffers, and other tensors that modules hold, by module and name"""


def load_in_main_process(
    load: Callable[[], Any],
    check: Callable[[Any], Scorer],
    policy: PolicyConfig,
    tokenizer: Any,
    arguments: transformers.TrainingArguments,
) -> Scorer:
    """Load and check the policy in the main process; in others give one that waits for its weights.

    All processes must call this. `load` and `check` run in the main process, the second on what the first gives.

    Raises:
        ConfigError: The other processes can't make the policy without its weights.
        RefshardError: `load` or `check` failed.
    """
    loaded: list[Scorer] = []

    def load_here() -> tuple[_Outline, Reading]:
        model = load()
        # Before the check: it may give the config an attention that other processes have not registered yet, and leave
        # the states of its batches in the modules.
        outline = _outline(model)
        loaded.append(check(model))
        return outline, loaded[0].reading

    outline, reading = on_main_process(load_here)
    fault = ""
    if not loaded:
        try:
            model = policy_without_weights(outline.model_config, policy)
            _take_outline(model, outline, widened=arguments.mixed_precision != "no")
            loaded.append(Scorer.of_checked(model, tokenizer, "policy.model", reading))
        except Exception as error:  # the libraries fail anywhere on what they can't make, and the main process waits
            fault = one_line(str(error)) or type(error).__name__
    if largest(int(bool(fault))):
        raise ConfigError(
            "train.fsdp_config.cpu_ram_efficient_loading: must be false for this policy, whose weights the main "
            f"process can't hand on ({fault or 'another process says why'}), got true. Set it to false"
        )
    return loaded[0]


def _outline(model: Any) -> _Outline:
    for parameter in model.parameters():
        # Processes send each other contiguous tensors alone.
        parameter.data = parameter.data.contiguous()
    return _Outline(
        model_config=copy.deepcopy(causal_of(model).config),
        parameters={
            name: (parameter.shape, parameter.dtype, parameter.requires_grad)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        },
        ties=tied_names(model),
        tensors={(path, name): tensor for path, name, _, tensor in _tensors_beside(model)},
    )


def _tensors_beside(model: Any) -> Iterator[tuple[str, str, dict[str, Any], torch.Tensor]]:
    """Yield the tensors of a model that are no parameters: the module's path, the name, and the dict that holds it."""
    for path, module in model.named_modules():
        for held in (module._buffers, vars(module)):
            for name, value in held.items():
                if isinstance(value, torch.Tensor):
                    yield path, name, held, value


def _take_outline(model: Any, outline: _Outline, *, widened: bool) -> None:
    """Give a model on the meta device the outline's buffers, and parameters of its dtypes without content.

    With `widened`, trained ones are float32, as accelerate widens them on mixed precision: that would fill them.

    Raises ValueError if the model is not the outline's.
    """
    found = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    other = found.items() ^ {(name, shape) for name, (shape, _, _) in outline.parameters.items()}
    beside = {(path, name): held for path, name, held, _ in _tensors_beside(model)}
    if other or beside.keys() != outline.tensors.keys():
        names = sorted({*(name for name, _ in other), *map(".".join, beside.keys() ^ outline.tensors.keys())})
        raise ValueError(f"{names[0]} is not in both")
    if other_ties := tied_names(model) ^ outline.ties:
        raise ValueError(f"the tie of {' and '.join(sorted(min(other_ties, key=sorted)))} is not in both")
    for place, held in beside.items():
        held[place[1]] = outline.tensors[place]
    made: dict[int, torch.nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            shape, dtype, trained = outline.parameters[f"{path}.{name}".removeprefix(".")]
            if id(parameter) not in made:
                # Not on the meta device: accelerate knows parameters by their memory.
                empty = torch.empty(shape, dtype=torch.float32 if trained and widened else dtype)
                made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=trained)
            module._parameters[name] = made[id(parameter)]
