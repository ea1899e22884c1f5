"""Stage two in several processes: DDP, FSDP2 and DeepSpeed give what one process gives, and go on from each other."""

import gc
import json
import math
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.base.errors import ConfigError, DataError, RefshardError, status_and_text
from pipeline.config.reader import load_config
from pipeline.run.checkpoints import MARKER, checkpoint_folders, processes_of
from pipeline.training import arguments, gate
from pipeline.training import processes as training_processes
from pipeline.training.arguments import training_arguments
from pipeline.training.fsdp import keep_outputs, load_optimizer, shard_exactly
from pipeline.training.gate import Gaps
from pipeline.training.processes import first_on_each_machine, of_main_process, on_main_process
from stages import train
from support.installed import as_installed, folder_of_others
from support.models import make_model, make_tokenizer
from support.runs import refshard, simple_rows, write_config, write_jsonl
from support.watched import Watched, main_process_loads_alone, start_ranks

pytestmark = pytest.mark.slow

nightly = pytest.mark.nightly

# How a run of eight pairs a step can be spread: processes, and settings.
TWO = {"train.gradient_accumulation_steps": 2}
SHARDED = {**TWO, "train.fsdp": "true"}
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ddp": (2, TWO),
    "fsdp": (2, SHARDED),
    "fsdp in shares": (2, {**SHARDED, "train.fsdp_config": "{state_dict_type: SHARDED_STATE_DICT}"}),
}
KINDS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"policy.lora.r": 4}, "tied": {}}
# A policy of this kind is trained on one set of plain pairs, the others on two sets of weighted pairs.
PLAIN = "tied"
# Saved expert by expert, loaded as one tensor of all of them.
EXPERTS = "experts"


class Runs:
    """Runs of one policy, that of one undisturbed process first of all."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self._kind = folder, KINDS.get(kind, {})
        make_model(folder / "model", make_tokenizer(bos=True), tie_word_embeddings=kind == "tied")
        if kind == EXPERTS:
            _make_experts(folder / "model")
        write_config(
            folder / "run.yaml",
            data={
                **_training_data(folder, kind),
                "max_length": 128,
                # Seven: of the last batches of two processes, one is half real, one not at all.
                "eval": {"test": {"path": str(write_jsonl(folder / "test.jsonl", simple_rows(7, start=100)))}},
            },
            policy={"model": str(folder / "model")},
            precompute={"output": str(folder / "shards"), "rows_per_shard": 16},
            loss={"beta": 0.1},
            train={
                "output_dir": str(folder / "undisturbed"),
                "per_device_train_batch_size": 2,
                "per_device_eval_batch_size": 3,
                "gradient_accumulation_steps": 4,
                "max_steps": 6,
                "learning_rate": 1e-3,
                # A weight whose gradient is rounding and nothing else must not move by it.
                "adam_epsilon": 1e-5,
                # Below the norms that come up, so that gradients are clipped.
                "max_grad_norm": 0.4,
                "logging_steps": 1,
                "eval_strategy": "steps",
                "eval_steps": 3,
                "save_strategy": "steps",
                "save_steps": 2,
                "disable_tqdm": True,
                "use_cpu": True,
            },
        )
        refshard("precompute", "--config", folder / "run.yaml")
        self.train("undisturbed", "one")

    def words(self, name: str, way: str, **settings: Any) -> list[str]:
        every = {"train.output_dir": self.folder / name, **self._kind, **WAYS[way][1], **settings}
        overrides = [word for key, value in every.items() for word in ("-o", f"{key}={value}")]
        return ["train", "--config", str(self.folder / "run.yaml"), *overrides]

    def start(self, name: str, way: str, before: Callable[[], None] | None = None, **settings: Any) -> list[Watched]:
        words, processes = self.words(name, way, **settings), WAYS[way][0]
        return [Watched(*words)] if processes == 1 else start_ranks(processes, *words, before=before)

    def train(self, name: str, way: str, before: Callable[[], None] | None = None, **settings: Any) -> list[Watched]:
        ranks = self.start(name, way, before, **settings)
        statuses = [rank.finish() for rank in ranks]
        assert not any(statuses), [rank.err for rank in ranks]
        return ranks

    def stop(self, name: str, way: str, **settings: Any) -> None:
        """Ask the last process alone to stop, in the middle of an epoch."""
        ranks = self.start(name, way, **settings)
        assert ranks[0].wait_until((self.folder / name / "checkpoint-2" / MARKER).exists), ranks[0].err
        ranks[-1].signal(signal.SIGTERM)
        assert [rank.finish() for rank in ranks] == [75] * len(ranks), [rank.err for rank in ranks]
        assert max(checkpoint_folders(self.folder / name)) < 6

    def check_equal(self, name: str, other: str = "undisturbed") -> None:
        """Losses, gradients and metrics of every step, held-out ones too, and the weights in the end."""
        ours, theirs = (_history(self.folder / run) for run in (name, other))
        assert len(ours) == len(theirs) == 8
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() & {"loss", "grad_norm", "eval_loss"}:
                assert a[key] == pytest.approx(b[key], rel=1e-5), (key, a["step"])
            for key in a:
                # At the first step every margin is 0 but for rounding, and which side of 0 it is on is chance.
                if a["step"] == 1 and key.startswith("rewards/accuracies"):
                    continue
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), (key, a["step"])
        weights, expected = (weights_of(self.folder / run) for run in (name, other))
        assert weights.keys() == expected.keys()
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6)


def _training_data(folder: Path, kind: str) -> dict[str, Any]:
    """Give the settings of 40 pairs: five steps an epoch."""
    if kind == PLAIN:
        return {"path": str(write_jsonl(folder / "pairs.jsonl", simple_rows(40)))}
    rows = [{**row, "w": (0.5, 1, 2)[i % 3], "m": i % 4 / 8} for i, row in enumerate(simple_rows(32))]
    twice, once = write_jsonl(folder / "twice.jsonl", rows[:8]), write_jsonl(folder / "once.jsonl", rows[8:])
    sets = {"twice": {"path": str(twice), "fraction": 2.0}, "once": {"path": str(once)}}
    return {"sets": {name: {**one, "columns": {"weight": "w", "margin": "m"}} for name, one in sets.items()}}


def _make_experts(folder: Path) -> None:
    """Put a mixture of experts in the place of a model of the same sizes."""
    settings = json.loads((folder / "config.json").read_text())
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    same = {key: settings[key] for key in (*sizes, "vocab_size", "initializer_range", "pad_token_id")}
    transformers.set_seed(0)
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**same, num_local_experts=4)).save_pretrained(folder)


def _history(output: Path) -> list[dict[str, float]]:
    entries = json.loads((output / "trainer_state.json").read_text())["log_history"]
    timing = ("runtime", "per_second", "preparation", "learning_rate")
    kept = [{k: v for k, v in entry.items() if not any(word in k for word in timing)} for entry in entries]
    return [entry for entry in kept if "loss" in entry or "eval_loss" in entry]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


def check_loads(folder: Path, base: Path) -> None:
    """A folder loads, with every weight that it holds."""
    if (folder / "adapter_config.json").exists():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        found = {name.replace(".default", ""): p for name, p in loaded.named_parameters() if "lora_" in name}
        assert found.keys() == weights_of(folder).keys()
    else:
        loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        found = dict(loaded.named_parameters())
    for name, tensor in weights_of(folder).items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runs]:
    made: dict[str, Runs] = {}

    def of(kind: str) -> Runs:
        if kind not in made:
            made[kind] = Runs(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return of


# What one process gives


@pytest.mark.parametrize(
    ("kind", "way", "settings"),
    [
        ("full", "ddp", {}),
        ("full", "fsdp in shares", {}),
        ("lora", "fsdp in shares", {"train.activation_offload": "true"}),
        ("tied", "fsdp", {}),
        pytest.param("lora", "ddp", {}, marks=nightly),
        pytest.param("tied", "ddp", {}, marks=nightly),
        pytest.param("tied", "fsdp in shares", {}, marks=nightly),
        pytest.param("full", "fsdp", {"train.gradient_checkpointing": "true"}, marks=nightly),
        pytest.param("full", "fsdp", {"train.fsdp_config": "{activation_checkpointing: true}"}, marks=nightly),
        pytest.param("full", "fsdp", {"train.fsdp_config": "{reshard_after_forward: false}"}, marks=nightly),
    ],
)
def test_two_processes_give_what_one_gives_and_checkpoints_that_load(
    runs: Callable[[str], Runs], kind: str, way: str, settings: Mapping[str, Any]
) -> None:
    """L8. Under FSDP only the main process reads the weights."""
    group = runs(kind)
    name = f"{way} {len(settings)}"
    ranks = group.train(name, way, main_process_loads_alone if "fsdp" in way else None, **settings)
    group.check_equal(name)
    assert "Parity gate: the policy before its first step is the reference" in ranks[0].out
    output = group.folder / name
    for folder in (output, output / "checkpoint-2"):
        check_loads(folder, group.folder / "model")
    saved = {file.name for file in (output / "checkpoint-2").iterdir()}
    shares = {"optimizer-00000-of-00002.pt", "optimizer-00001-of-00002.pt"}
    assert saved >= (shares if "shares" in way else {"optimizer.pt"}) | {"rng_state_0.pth", "rng_state_1.pth"}
    marker = json.loads((output / "checkpoint-2" / MARKER).read_text())
    assert set(marker["files"]) == saved - {MARKER}
    shutil.rmtree(output)


def test_the_best_policy_of_a_sharded_run_is_saved_and_again_where_nothing_is_left_to_train(
    runs: Callable[[str], Runs],
) -> None:
    group = runs("full")
    best = {
        "train.load_best_model_at_end": "true",
        "train.metric_for_best_model": "eval_loss",
        # The loss is largest at first.
        "train.greater_is_better": "true",
        "train.eval_steps": 2,
    }
    group.train("best", "fsdp in shares", **best)
    output = group.folder / "best"
    first = weights_of(output / "checkpoint-2")
    assert weights_of(output).keys() == first.keys()
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights_of(output).items())
    for name in ("run.json", "model.safetensors"):
        (output / name).unlink()
    # A folder that was stopped after its last checkpoint.
    group.train("best", "fsdp", **{**best, "train.load_best_model_at_end": "false"})
    last = weights_of(output / "checkpoint-6")
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights_of(output).items())


# Another number of processes


def _change(runs: Callable[[str], Runs], kind: str, before: str, after: str) -> None:
    group = runs(kind)
    name = f"{before} then {after}"
    group.stop(name, before)
    ranks = group.train(name, after)
    assert f"Resuming {group.folder / name}" in ranks[0].out
    changed = WAYS[before][0] != WAYS[after][0]
    assert ("saved by" in ranks[0].out) == changed
    assert "dropout" not in ranks[0].out
    group.check_equal(name)
    shutil.rmtree(group.folder / name)


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [("full", "fsdp in shares", "one"), ("full", "ddp", "one"), ("full", "one", "fsdp"), ("lora", "one", "ddp")],
)
def test_a_stopped_run_goes_on_in_another_number_of_processes(
    runs: Callable[[str], Runs], kind: str, before: str, after: str
) -> None:
    _change(runs, kind, before, after)


def test_a_stopped_mixture_of_experts_goes_on_bit_for_bit(runs: Callable[[str], Runs]) -> None:
    """The library's own resume finds none of the experts' weights under the names that they were saved by."""
    group = runs(EXPERTS)
    group.stop("stopped", "one")
    group.train("stopped", "one")
    output, undisturbed = group.folder / "stopped", group.folder / "undisturbed"
    assert (output / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert _history(output) == _history(undisturbed)


@nightly
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", WAYS)
@pytest.mark.parametrize("after", WAYS)
def test_a_stopped_run_goes_on_in_every_other_way(
    runs: Callable[[str], Runs], kind: str, before: str, after: str
) -> None:
    _change(runs, kind, before, after)


def test_another_number_of_pairs_a_step_is_refused_and_other_random_numbers_are_told(
    runs: Callable[[str], Runs],
) -> None:
    group, dropout = runs("lora"), {"policy.lora.dropout": 0.2}
    group.stop("dropout", "ddp", **dropout)
    refused = refshard(*group.words("dropout", "one", **dropout, **TWO), check=78)
    assert "processes x gradient_accumulation_steps: saved 4, this run 2" in refused.stderr
    told = group.train("dropout", "one", **dropout)[0].out
    assert "saved by 2 processes, in 1; dropout draws other random numbers" in told


# Launchers


def test_accelerate_launch_trains_a_sharded_policy(runs: Callable[[str], Runs], tmp_path: Path) -> None:
    group = runs("full")
    with socket.socket() as held:
        # accelerate looks for a free port and may lose it again; where its own is taken, torchrun keeps one from the
        # moment on that it has it.
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = f"--main_process_port={held.getsockname()[1]}"
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", port]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "refshard", *group.words("launched", "fsdp")],
            cwd=folder_of_others(tmp_path / "work"),
            env=as_installed(tmp_path / "site"),
            timeout=300,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    group.check_equal("launched")
    assert processes_of(group.folder / "launched" / "checkpoint-2") == 2


# 16 bits


@nightly
def test_a_sharded_policy_in_bf16_starts_at_ln_2(runs: Callable[[str], Runs]) -> None:
    """FSDP casts all weights, so the reference is told to compute with such; accelerate must not round log-probs."""
    group = runs("full")
    as_sharded = {"reference.dtype": "bfloat16", "reference.autocast": "bfloat16"}
    way = {"train.bf16": "true", "precompute.output": group.folder / "shards-bf16", "train.max_steps": 1, **as_sharded}
    overrides = [word for key, value in way.items() for word in ("-o", f"{key}={value}")]
    refshard("precompute", "--config", group.folder / "run.yaml", *overrides)
    group.train("bf16", "fsdp", **way, **{"train.eval_strategy": "no"})
    first = _history(group.folder / "bf16")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)


def test_sharding_leaves_a_forwards_results_as_they_are() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    keep_outputs(plugin)
    assert plugin.mixed_precision_policy is None
    plugin.set_mixed_precision("bf16")
    keep_outputs(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.output_dtype) == (torch.bfloat16, None)


# DeepSpeed


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_deepspeed_gives_what_one_process_gives_and_goes_on(
    runs: Callable[[str], Runs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    zero3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    settings = {
        "zero_optimization": zero3,
        "zero_allow_untested_optimizer": True,
        # Not its own, which is compiled for the machine.
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"),
    }
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps(settings))
    group, way = runs(kind), {"train.deepspeed": file if kind == "full" else json.dumps(settings)}
    group.stop("deepspeed", "ddp", **way)
    assert (group.folder / "deepspeed" / "checkpoint-2" / "latest").exists()
    refused = refshard(*group.words("deepspeed", "one", **way), check=78)
    assert "processes: saved 2, this run 1" in refused.stderr
    group.train("deepspeed", "ddp", **way)
    group.check_equal("deepspeed")
    check_loads(group.folder / "deepspeed", group.folder / "model")
    shutil.rmtree(group.folder / "deepspeed")


# Settings that can't work are refused before anything is loaded


def _arguments(**changes: Any) -> Any:
    return SimpleNamespace(**{"fsdp": True, "fsdp_config": {}, "world_size": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 1}, "train.fsdp: must be off in one process"),
        ({"fsdp_config": {"version": 1}}, "train.fsdp_config: must be FSDP2's, got version 1"),
        ({"fsdp_config": {"xla": True}}, "xla True"),
        (
            {"fsdp_config": {"state_dict_type": "LOCAL_STATE_DICT"}},
            "state_dict_type: must be FULL_STATE_DICT or SHARDED_STATE_DICT, got LOCAL",
        ),
        (
            {"fsdp_config": {"activation_checkpointing": "true"}},
            "activation_checkpointing: must be off with an adapter",
        ),
    ],
)
def test_what_fsdp_can_not_do_here_is_refused(changes: dict[str, Any], message: str) -> None:
    adapted: Any = SimpleNamespace(policy=SimpleNamespace(has_adapter=True))
    with pytest.raises(ConfigError, match=message):
        arguments._check_fsdp(_arguments(**changes), adapted)
    arguments._check_fsdp(_arguments(), adapted)


@pytest.mark.parametrize(
    ("settings", "quantization", "method", "once"),
    [
        ({}, None, None, True),
        ({"cpu_ram_efficient_loading": "false"}, None, None, False),
        ({}, object(), None, False),
        # The files' own.
        ({}, None, "bitsandbytes", False),
        ({}, None, "mxfp4", True),
    ],
)
def test_the_main_process_loads_alone_by_default_unless_the_weights_are_quantized(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: dict[str, Any],
    quantization: Any,
    method: str | None,
    once: bool,
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": method and {"quant_method": method}}))
    made, config = _arguments(fsdp_config=settings, fsdp_plugin_args={}), SimpleNamespace()
    assert not arguments.loads_once(made)
    config.policy = SimpleNamespace(model=str(tmp_path), revision=None, quantization=quantization)
    arguments._load_once(made, config)  # type: ignore[arg-type]
    assert arguments.loads_once(made) is once
    # Otherwise the library itself leaves weights out of every model that other processes load.
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_saved_buffers_are_whole_while_weights_are_handed_on_and_saved_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "True")
    model = torch.nn.BatchNorm1d(2)
    names = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    seen: list[set[str]] = []
    accelerator = SimpleNamespace(prepare=lambda *given: seen.append(set(given[0].state_dict())) or given)
    shard_exactly(accelerator)
    # Accelerate's plugin has set it: a model that this process reads later would have no weights.
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    optimizer = object()
    assert accelerator.prepare(model, optimizer) == (model, optimizer)
    assert seen == [{"weight", "bias"}]
    assert set(model.state_dict()) == names


def test_sharding_that_ties_other_weights_or_fails_is_refused() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1, bias=False) for name in ("base", "own", "head")})
    model["head"].weight = model["base"].weight

    def tie(*given: Any) -> Any:
        model["head"].weight = model["own"].weight
        return given

    def fail(*given: Any) -> Any:
        raise ValueError("no such layer\nat all")

    for prepare, message in (
        (tie, "must be off for an adapter that trains a tied embedding"),
        (fail, r"must be off for a policy that can't be sharded so \(no such layer at all\), got on"),
    ):
        accelerator = SimpleNamespace(prepare=prepare)
        shard_exactly(accelerator)
        with pytest.raises(ConfigError, match=f"train.fsdp: {message}"):
            accelerator.prepare(model)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "train.fsdp: must be set, as accelerate launch was told"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "train.deepspeed: must be set, as accelerate launch was told"),
        ("WORLD_SIZE", "2", "2 processes were started, but none sees a GPU"),
    ],
)
def test_a_launcher_that_the_settings_know_nothing_of_is_refused(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    config = load_config(make_run(train={"use_cpu": False}))
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        training_arguments(config)


@pytest.mark.parametrize(("word", "fsdp"), [("true", True), ("false", None), ("null", None)])
def test_fsdp_is_switched_by_yes_and_no(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, word: str, fsdp: bool | None
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(arguments, "_check_fsdp", lambda made, config: seen.append(made.fsdp))
    training_arguments(load_config(make_run(), [f"train.fsdp={word}"]))
    assert seen == [fsdp]


def test_zero_3_that_would_save_no_policy_is_refused() -> None:
    for on in (True, False):
        settings = SimpleNamespace(is_zero3=lambda: True, is_true=lambda key, on=on: on)
        made: Any = SimpleNamespace(deepspeed="zero3.json", hf_deepspeed_config=settings)
        if on:
            arguments._check_deepspeed(made)
        else:
            with pytest.raises(ConfigError, match="stage3_gather_16bit_weights_on_model_save must be true"):
                arguments._check_deepspeed(made)


# Shares of the optimizer's state


def _make_shares(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Two shares of a state, as two processes write them, and the optimizer that they belong to."""
    parameters = [torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.AdamW(parameters, lr=0.5)
    whole = {name: [torch.randn(3, 2), torch.randn(1)] for name in ("exp_avg", "exp_avg_sq")}
    groups = optimizer.state_dict()["param_groups"]
    for rank, rows in enumerate((slice(0, 2), slice(2, 3))):
        state = {
            index: {"step": torch.tensor(4.0), **{name: tensors[index][rows] for name, tensors in whole.items()}}
            for index in range(2)
        }
        cut = [[index, name] for index in range(2) for name in whole]
        torch.save({"state": state, "param_groups": groups, "cut": cut}, folder / f"optimizer-{rank:05d}-of-00002.pt")
    return optimizer, whole


def test_shares_are_put_together_whatever_their_sizes(tmp_path: Path) -> None:
    optimizer, whole = _make_shares(tmp_path)
    load_optimizer(optimizer, tmp_path)
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        state = optimizer.state[parameter]
        assert state["step"] == 4
        for name, tensors in whole.items():
            assert torch.equal(state[name], tensors[index])
    _lets_go_of(tmp_path)


def test_a_state_that_is_loaded_lets_go_of_its_file(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(300, 20))
    parameter.grad = torch.ones(300, 20)
    before, after = (torch.optim.AdamW([parameter], lr=0.5) for _ in range(2))
    before.step()
    torch.save(before.state_dict(), tmp_path / "optimizer.pt")
    load_optimizer(after, tmp_path)
    assert torch.equal(after.state[parameter]["exp_avg"], before.state[parameter]["exp_avg"])
    _lets_go_of(tmp_path)


def _lets_go_of(folder: Path) -> None:
    """Checkpoints are deleted while the run goes on, and a mapped file stays, under NFS by another name."""
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_share_is_named(tmp_path: Path, rank: int) -> None:
    optimizer, _ = _make_shares(tmp_path)
    (tmp_path / f"optimizer-{rank:05d}-of-00002.pt").unlink()
    with pytest.raises(DataError, match=f"optimizer-{rank:05d}-of-00002.pt is missing"):
        load_optimizer(optimizer, tmp_path)


def test_no_share_runs_code(tmp_path: Path) -> None:
    optimizer, _ = _make_shares(tmp_path)

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"state": {}, "cut": [], "param_groups": Payload()}, tmp_path / "optimizer-00001-of-00002.pt")
    with pytest.raises(Exception, match=r"(?i)weights.only|Unsupported"):
        load_optimizer(optimizer, tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "count"),
    [(["rng_state.pth"], 1), (["rng_state_0.pth", "rng_state_1.pth"], 2), (["rng_state_0.pth"], None), ([], None)],
)
def test_how_many_processes_saved_is_told_by_their_random_states(
    tmp_path: Path, names: list[str], count: int | None
) -> None:
    for name in names:
        (tmp_path / name).touch()
    if count is None:
        with pytest.raises(DataError, match="is missing"):
            processes_of(tmp_path)
    else:
        assert processes_of(tmp_path) == count


# One decision for all


def test_every_process_decides_by_the_main_ones_gaps(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run()
    refshard("precompute", "--config", config)
    monkeypatch.setattr(
        gate, "of_main_process", lambda gaps: Gaps([values + 1 for values in gaps.values], gaps.parts, gaps.margins)
    )
    with pytest.raises(RefshardError, match="is not the reference"):
        train.run(load_config(config))


def test_the_main_processes_value_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_main_process("mine") == "mine"
    monkeypatch.setattr(training_processes, "PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(training_processes, "broadcast_object_list", lambda values: ["the main one's"])
    assert of_main_process("mine") == "the main one's"


@pytest.mark.parametrize(
    ("failure", "status"), [(DataError("damaged"), 65), (MemoryError(), 75), (KeyError("a bug"), 1)], ids=repr
)
def test_a_failure_of_the_main_process_ends_the_processes_that_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, status: int
) -> None:
    """What it sends them is pickled; here they get it one after the other."""
    sent: list[bytes] = []

    def broadcast(values: list[Any]) -> Any:
        sent.append(pickle.dumps(values))
        return pickle.loads(sent[0])

    def fail() -> None:
        raise failure

    monkeypatch.setattr(training_processes, "broadcast_object_list", broadcast)
    for is_main in (True, False):
        state = SimpleNamespace(num_processes=2, is_main_process=is_main)
        monkeypatch.setattr(training_processes, "PartialState", lambda state=state: state)
        with pytest.raises(Exception) as caught:
            on_main_process(fail if is_main else lambda: pytest.fail("not the main process"))
        assert isinstance(caught.value, type(failure) if is_main else RefshardError)
        assert status_and_text(caught.value)[0] == status
    assert len(sent) == 2


@pytest.mark.parametrize("key", ["accelerator_config", "deepspeed", "fsdp_config"])
def test_a_file_of_settings_that_is_no_regular_file_or_far_too_large_is_refused_unopened(
    make_run: Callable[..., Path], tmp_path: Path, key: str
) -> None:
    config, fifo, large = make_run(), tmp_path / "fifo.json", tmp_path / "large.json"
    os.mkfifo(fifo)
    large.touch()
    os.truncate(large, 2**40)
    for file, kind in ((fifo, "a FIFO"), (large, "1,099,511,627,776 bytes"), (tmp_path, "a folder")):
        with pytest.raises(ConfigError, match=f"train.{key}: must be a regular file of settings, got {kind}"):
            training_arguments(load_config(config, [f"train.{key}={file}"]))


@pytest.mark.parametrize("is_first", [True, False])
def test_one_process_of_a_machine_reads_first_and_its_failure_is_everyones(
    monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    state = SimpleNamespace(num_processes=4, is_local_main_process=is_first)
    monkeypatch.setattr(training_processes, "PartialState", lambda: state)
    monkeypatch.setattr(training_processes, "largest", lambda value: value)
    calls: list[str] = []
    assert first_on_each_machine(lambda: calls.append("first"), lambda: calls.append("then")) is None
    assert calls == ["first" if is_first else "then"]

    def fail() -> None:
        raise DataError("damaged")

    monkeypatch.setattr(training_processes, "largest", lambda value: max(value, DataError.exit_status))
    with pytest.raises(RefshardError, match="damaged" if is_first else "another process of the run failed") as caught:
        first_on_each_machine(fail, lambda: calls.append("then"))
    assert (caught.value.exit_status, len(calls)) == (65, 1)
