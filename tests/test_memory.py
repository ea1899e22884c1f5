"""Peak memory of whole processes: stage two holds one model, stage one does not grow with the dataset."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_tokenizer, simple_rows, write_config, write_jsonl

pytestmark = pytest.mark.slow

MIB = 2**20

# Peak resident memory of a process, and what it held once everything was imported, both in bytes. The kernel's
# high-water mark is reset after the imports, whose own peak would hide small models.
_MEASURE = """
import json, re, sys
from pathlib import Path
def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
{imports}
Path("/proc/self/clear_refs").write_text("5")
start = memory("VmRSS")
{work}
print("MEASURED", json.dumps([start, memory("VmHWM")]))
"""

_OURS = """
from stages.cli import main
main.main({arguments!r}, standalone_mode=False)
"""

_IMPORTS = "import stages.precompute, stages.train; from transformers import AutoTokenizer, LlamaForCausalLM"

_TRL = """
rows = [json.loads(line) for line in Path({data!r}).read_text().splitlines()]
load = transformers.AutoModelForCausalLM.from_pretrained
trainer = trl.DPOTrainer(
    model=load({model!r}, dtype=torch.float32),
    ref_model=load({model!r}, dtype=torch.float32),
    args=trl.DPOConfig(output_dir={output!r}, bf16=False, gradient_checkpointing=False, report_to="none",
        max_length=64, **{train!r}),
    train_dataset=datasets.Dataset.from_list(rows),
    processing_class=transformers.AutoTokenizer.from_pretrained({model!r}),
)
trainer.train()
trainer.save_model()
"""


def _measure(imports: str, work: str) -> int:
    """Bytes that the work took on top of the imported program."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc, which this system does not have")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE.format(imports=imports, work=work)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        # glibc keeps freed blocks for reuse; given back at once, the high-water mark is what was really held.
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    start, peak = json.loads(done.stdout.split("MEASURED")[1])
    return int(peak - start)


def test_stage_two_holds_one_model_where_trl_with_a_live_reference_holds_two(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos=True)
    # Nearly all weights in the layers: a model of about 190 MiB, whose activations on short pairs weigh little.
    model = make_model(
        tmp_path / "model",
        tokenizer,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        initializer_range=0.02,
    )
    weights = (model / "model.safetensors").stat().st_size
    data = write_jsonl(tmp_path / "pairs.jsonl", simple_rows(8))
    train: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "max_steps": 2,
        "optim": "sgd",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    config = write_config(
        tmp_path / "run.yaml",
        data={"path": str(data), "max_length": 64},
        policy={"model": str(model)},
        precompute={"output": str(tmp_path / "shards")},
        train={"output_dir": str(tmp_path / "ours"), **train},
    )
    scoring = _measure(_IMPORTS, _OURS.format(arguments=["precompute", "--config", str(config)]))
    training = _measure(_IMPORTS, _OURS.format(arguments=["train", "--config", str(config)]))
    trl = _measure(
        "import datasets, torch, transformers, trl; from trl import DPOTrainer",
        _TRL.format(data=str(data), model=str(model), output=str(tmp_path / "trl"), train=train),
    )
    sizes = {"weights": weights, "stage one": scoring, "stage two": training, "TRL": trl}
    print({name: f"{size / MIB:.0f} MiB" for name, size in sizes.items()})
    # One copy of the weights and one of their gradients, and no third: the reference's.
    assert training < 2.6 * weights
    assert trl - training > 0.8 * weights
    assert scoring < 1.8 * weights


def test_stage_one_takes_no_more_memory_for_ten_times_the_pairs(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos=True)
    model = make_model(tmp_path / "model", tokenizer)
    peaks = {}
    for count in (400, 4000):
        data = write_jsonl(tmp_path / f"pairs-{count}.jsonl", simple_rows(count))
        config = write_config(
            tmp_path / f"run-{count}.yaml",
            data={"path": str(data), "max_length": 128},
            policy={"model": str(model)},
            precompute={"output": str(tmp_path / f"shards-{count}"), "rows_per_shard": 200, "tokens_per_batch": 4096},
        )
        peaks[count] = _measure(_IMPORTS, _OURS.format(arguments=["precompute", "--config", str(config)]))
    print({count: f"{peak / MIB:.1f} MiB" for count, peak in peaks.items()})
    # 3,600 more pairs held in memory as tokens and token logps alone would be over 10 MiB.
    assert peaks[4000] - peaks[400] < 8 * MIB
