"""The private and undocumented things of other libraries that this package leans on, each by name.

An upgrade that renames one of them may leave an override that is never called, with no other sign of it. Each test
says which assumption died.
"""

import atexit
import inspect
import multiprocessing.util
import re
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.data_loader import DataLoaderShard
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState
from accelerate.utils import fsdp_utils, send_to_device
from peft.tuners import lora
from torch.nn.attention.flex_attention import BlockMask
from transformers import Trainer
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.integrations import deepspeed, integration_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.trainer_pt_utils import find_batch_size

from pipeline.data.tokens import TokenizedPair
from pipeline.scoring.packing import pad_pairs
from pipeline.training.batches import JoinedBatch
from pipeline.training.trainer import PairTrainer

OVERRIDDEN = {
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
}
"""Private methods of the library's trainer in place of which ours are called"""

PARAMETERS = {
    # Overridden, private.
    "_save_checkpoint": ["model", "trial"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    # Called, private.
    "_evaluate": ["trial", "ignore_keys_for_eval"],
    "_determine_best_metric": ["metrics", "trial"],
    "_load_best_model": [],
    # Overridden, public; the second parameter of save_model is not.
    "create_accelerator_and_postprocess": [],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
    "prediction_step": ["model", "inputs", "prediction_loss_only", "ignore_keys"],
    "floating_point_ops": ["inputs"],
    "get_train_dataloader": [],
    "get_eval_dataloader": ["eval_dataset"],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "save_model": ["output_dir", "_internal_call"],
    "create_optimizer": ["model"],
    "create_scheduler": ["num_training_steps", "optimizer"],
    "log": ["logs", "start_time"],
}

CALLERS = {
    "_save_checkpoint": "_maybe_log_save_evaluate",
    "_save_optimizer_and_scheduler": "_save_checkpoint",
    "_load_from_checkpoint": "train",
    "_load_optimizer_and_scheduler": "_prepare_for_training",
    "save_model": "_save_checkpoint",
    "get_batch_samples": "_run_epoch",
    "create_optimizer": "create_optimizer_and_scheduler",
    "create_scheduler": "create_optimizer_and_scheduler",
    "prediction_step": "evaluation_loop",
    "get_train_dataloader": "_inner_training_loop",
    "get_eval_dataloader": "evaluate",
    "create_accelerator_and_postprocess": "__init__",
    "floating_point_ops": "_run_epoch",
    "is_in_train": "train",
    "model_accepts_loss_kwargs": "training_step",
}
"""Where the library calls a method, or reads an attribute, that is ours"""


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_few_private_methods_of_the_librarys_trainer_are_overridden() -> None:
    theirs = {name for name in vars(PairTrainer) if hasattr(Trainer, name)}
    assert {name for name in theirs if _is_private(name)} == OVERRIDDEN
    assert len(OVERRIDDEN) <= 4
    public = {name for name in theirs if not name.startswith("_") and callable(getattr(Trainer, name))}
    assert public | OVERRIDDEN == PARAMETERS.keys() - {"_evaluate", "_determine_best_metric", "_load_best_model"}


@pytest.mark.parametrize("method", PARAMETERS)
def test_a_method_of_the_trainer_has_the_parameters_that_are_handed_to_it(method: str) -> None:
    theirs = list(inspect.signature(getattr(Trainer, method)).parameters)[1:]
    assert theirs[: len(PARAMETERS[method])] == PARAMETERS[method]
    others = theirs[len(PARAMETERS[method]) :]
    assert method == "_evaluate" or not others, f"the library may hand over {others}, too"


@pytest.mark.parametrize("method", CALLERS)
def test_the_trainer_calls_what_is_overridden(method: str) -> None:
    assert f"self.{method}" in inspect.getsource(getattr(Trainer, CALLERS[method]))


def test_the_control_that_is_saved_says_that_an_evaluation_is_due() -> None:
    control = transformers.TrainerControl(should_evaluate=True)
    assert type(control).__name__ == "TrainerControl"
    assert control.state()["args"]["should_evaluate"] is True


def test_batches_of_the_loop_go_to_their_device_by_themselves() -> None:
    """The library rounds float tensors of a batch to the policy's dtype under DeepSpeed: reference logps, too."""
    ids = [1, 2, 3]
    column = torch.tensor([-350.25])
    joined = JoinedBatch(
        ids=torch.zeros(1, 3, dtype=torch.int64),
        batch=pad_pairs([TokenizedPair(prompt_ids=ids, chosen_ids=ids, rejected_ids=ids)], 0),
        ref_chosen_logps=column,
        ref_rejected_logps=column,
        truncated=torch.tensor([False]),
        ref_token_logps=None,
    )
    inputs = {"rows": torch.tensor([7]), "joined": joined}
    trainer = object.__new__(PairTrainer)
    dtype = type("Config", (), {"dtype": lambda self: torch.bfloat16})()
    state = type("State", (), {"deepspeed_plugin": type("Plugin", (), {"hf_ds_config": dtype})()})()
    trainer.accelerator = type("Fake", (), {"state": state})()
    trainer.args = type("Arguments", (), {"device": torch.device("cpu")})()  # type: ignore[assignment]
    trainer.is_deepspeed_enabled = True
    assert trainer._prepare_inputs({"logps": column})["logps"].dtype == torch.bfloat16
    prepared: Any = trainer._prepare_inputs(inputs)
    assert prepared["joined"].ref_chosen_logps.dtype == torch.float32
    moved = send_to_device(inputs, torch.device("meta"))["joined"]
    assert moved.ref_chosen_logps.device.type == moved.batch.input_ids.device.type == "meta"
    assert moved.ref_token_logps is None
    assert find_batch_size(inputs) == accelerate.utils.find_batch_size(inputs) == 1


def test_the_loader_that_has_the_workers_is_inside_of_accelerates() -> None:
    plain = torch.utils.data.DataLoader([1, 2], num_workers=0)  # type: ignore[arg-type]
    prepared: Any = Accelerator(cpu=True).prepare(plain)
    assert isinstance(prepared, DataLoaderShard)
    assert isinstance(prepared.base_dataloader, torch.utils.data.DataLoader)
    assert hasattr(prepared.base_dataloader, "worker_init_fn")
    finalizer = multiprocessing.util.Finalize(None, print, args=(), exitpriority=0)
    finalizer.cancel()


def test_functions_that_wait_for_the_end_of_the_process_can_be_run_before_it() -> None:
    assert callable(atexit._run_exitfuncs)


def test_the_processes_state_is_shared_by_its_dict() -> None:
    PartialState()
    assert "distributed_type" in PartialState._shared_state
    assert "fsdp_plugin" in inspect.getsource(AcceleratorState)


def test_sharding_takes_the_main_processes_weights_by_name_and_widens_as_expected() -> None:
    sharding = inspect.getsource(fsdp_utils.fsdp2_prepare_model)
    assert "fsdp2_plugin.cpu_ram_efficient_loading" in sharding
    assert 'accelerator.mixed_precision != "no"' in sharding and "param.requires_grad" in sharding
    # Buffers outside of the state dict are kept, and only those.
    assert "get_non_persistent_buffers(model, recurse=True, fqns=True)" in sharding
    assert "src=0" in inspect.getsource(fsdp_utils.fsdp2_load_full_state_dict)
    module = torch.nn.BatchNorm1d(1)
    module._non_persistent_buffers_set.update(module._buffers)
    assert module.state_dict().keys() == {"weight", "bias"}
    # Parameters are known by their memory, which those on the meta device do not have.
    assert "data_ptr" in inspect.getsource(accelerate.Accelerator._get_named_parameters)


def test_the_deepspeed_config_can_be_taken_from_the_loading_of_models() -> None:
    assert callable(deepspeed.set_hf_deepspeed_config) and callable(deepspeed.unset_hf_deepspeed_config)


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "mlflow", "azure_ml", "comet_ml"])
def test_the_library_can_be_asked_for_a_tracker(tracker: str) -> None:
    names = [f"is_{spelled}_available" for spelled in (tracker.replace("_", ""), tracker.replace("_ml", ""))]
    assert any(hasattr(integration_utils, name) for name in names)


@pytest.fixture(scope="module")
def model() -> Any:
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    return transformers.MixtralForCausalLM(config)


def test_a_models_attention_is_named_by_its_config_and_looked_up_by_that_name(model: Any) -> None:
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        assert table["sdpa"] is not None
    assert {"module", "query", "key", "value"} <= inspect.signature(ALL_ATTENTION_FUNCTIONS["sdpa"]).parameters.keys()
    flex = inspect.signature(ALL_ATTENTION_FUNCTIONS["flex_attention"]).parameters
    assert {"scaling", "softcap"} <= flex.keys()
    transformers.AttentionInterface.register("refshard_contract", lambda *args, **kwargs: None)
    transformers.AttentionMaskInterface.register("refshard_contract", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("refshard_contract")
    assert model.config.get_text_config()._attn_implementation == "refshard_contract"
    model.set_attn_implementation("sdpa")


def test_a_mixture_of_experts_names_its_routers_and_gives_their_logits(model: Any) -> None:
    assert hasattr(model.config, "output_router_logits") and hasattr(model.config, "router_aux_loss_coef")
    recorders = model.base_model._can_record_outputs["router_logits"]
    kinds = [getattr(recorder, "target_class", recorder) for recorder in [recorders]]
    assert any(isinstance(module, kind) for module in model.modules() for kind in kinds)
    outputs = model(input_ids=torch.tensor([[1, 2, 3]]), output_router_logits=True, logits_to_keep=1)
    assert outputs.aux_loss.ndim == 0 and outputs.logits.shape == (1, 1, 32)


def test_a_block_mask_is_made_of_lists_of_blocks() -> None:
    taken = inspect.signature(BlockMask.from_kv_blocks).parameters
    assert list(taken)[:4] == ["kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"]
    assert {"BLOCK_SIZE", "mask_mod", "seq_lengths"} <= taken.keys()


def test_a_module_that_is_kept_off_its_device_says_where_it_runs() -> None:
    module = torch.nn.Linear(1, 1)
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", offload=True, weights_map={}))
    hook: Any = module._hf_hook
    assert str(hook.execution_device) == "cpu"


def test_a_view_names_the_parameter_that_it_is_of() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    assert parameter.t()._base is parameter


def test_adapters_are_named_switched_and_taken_off(model: Any) -> None:
    config = peft.LoraConfig(r=1, target_modules=["q_proj"], lora_dropout=0.5)
    wrapped: Any = peft.get_peft_model(model, config)
    try:
        assert wrapped.active_adapter == "default"
        assert wrapped.peft_config["default"].bias == "none"
        assert isinstance(wrapped.base_model, lora.LoraModel)
        drops = [name for name, module in wrapped.named_modules() if isinstance(module, torch.nn.Dropout)]
        assert any("lora_dropout" in name for name in drops)
        for method in ("load_adapter", "set_adapter", "delete_adapter", "disable_adapter", "get_base_model"):
            assert callable(getattr(wrapped, method))
    finally:
        wrapped.unload()


LOADING: list[tuple[Callable[..., Any], set[str]]] = [
    (DistributedConfig, {"tp_plan"}),
    (transformers.PreTrainedModel.save_pretrained, {"state_dict", "max_shard_size"}),
    (peft.PeftModel.load_adapter, {"is_trainable"}),
    (accelerate.Accelerator.unwrap_model, {"keep_torch_compile"}),
]


@pytest.mark.parametrize(("taker", "options"), LOADING, ids=lambda value: getattr(value, "__qualname__", ""))
def test_options_without_documentation_are_taken(taker: Callable[..., Any], options: set[str]) -> None:
    assert options <= inspect.signature(taker).parameters.keys()


def test_the_arguments_look_for_devices_in_one_place() -> None:
    assert "_setup_devices" in vars(transformers.TrainingArguments)
    assert transformers.TrainingArguments.device.fget is not None
    assert "self._setup_devices" in inspect.getsource(transformers.TrainingArguments.device.fget)


TRACKERS = {
    "WandbCallback": "setup",
    "MLflowCallback": "setup",
    "TrackioCallback": "setup",
    "TensorBoardCallback": "on_train_begin",
}
"""Callback -> method that gives the tracker the run's settings"""


def test_trackers_can_be_told_which_page_to_continue_and_kept_from_ending_it() -> None:
    assert {"wandb", "mlflow", "trackio", "tensorboard"} <= integration_utils.INTEGRATION_TO_CALLBACK.keys()
    for variable in ("MLFLOW_RUN_ID", "MLFLOW_MAX_LOG_PARAMS"):
        assert variable in inspect.getsource(integration_utils.MLflowCallback.setup)
    assert re.search(
        r'name=args\.run_name,.*resume="allow"', inspect.getsource(integration_utils.TrackioCallback), re.S
    )
    board = inspect.getsource(integration_utils.TensorBoardCallback)
    assert "if self.logging_dir is None:" in board and "log_dir=self.logging_dir" in board
    assert "getattr(callback, event)(" in inspect.getsource(transformers.trainer_callback.CallbackHandler.call_event)


@pytest.mark.parametrize("name", TRACKERS)
def test_trackers_take_a_run_s_settings_from_the_arguments_dict(name: str) -> None:
    callback = getattr(integration_utils, name)
    source = inspect.getsource(getattr(callback, TRACKERS[name]))
    assert "args.to_dict()" in source or "args.to_json_string()" in source
    assert "self.to_dict()" in inspect.getsource(transformers.TrainingArguments.to_json_string)
