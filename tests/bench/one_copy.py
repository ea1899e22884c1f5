"""Peak memory of two processes that train one policy under FSDP2, with and without one copy of it being loaded.

    python tests/bench/one_copy.py [--layers 24] [--folder DIR]

A random Llama in float32, by default of 350 MiB, gets a LoRA adapter and trains for one step. By default the main
process alone loads the weights; with train.fsdp_config.cpu_ram_efficient_loading: false every process does. Python and
torch take some 500 MiB of each. The step is not measured: on processors its memory hides that of the weights.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from torch.distributed import TCPStore  # noqa: E402

from support.models import make_model, make_tokenizer  # noqa: E402
from support.runs import simple_rows, write_config, write_jsonl  # noqa: E402

RANKS = 2


def make_run(folder: Path, layers: int) -> Path:
    """Write the model, the pairs and the settings; give the file of settings."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": layers}
    make_model(folder / "model", make_tokenizer(bos=True), **sizes, num_attention_heads=8)
    return write_config(
        folder / "run.yaml",
        data={"path": str(write_jsonl(folder / "pairs.jsonl", simple_rows(8))), "max_length": 128},
        policy={"model": str(folder / "model"), "lora": {"r": 4}},
        precompute={"output": str(folder / "shards")},
        train={
            "output_dir": str(folder / "policy"),
            "per_device_train_batch_size": 2,
            "max_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
        },
    )


def train(config: Path, *overrides: str) -> list[float]:
    """Train in processes that are ranks of one launch; give each one's peak memory in MiB until training begins."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    started = [
        subprocess.Popen(
            [*command(), "train", "--config", config, "--overwrite", *overrides],
            env=environment({**common, "RANK": rank, "LOCAL_RANK": rank}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    said = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started)
    return [float(re.findall(rf"^{PEAK} (\d+)$", text, re.MULTILINE)[0]) / 1024 for text in said]


PEAK = "peak until training begins, in KiB:"


def command() -> list[str]:
    """Give the words that run refshard's command, which prints its peak memory where training begins."""
    program = f"""
import re, sys
from pathlib import Path
from stages import cli, train
gate = train.run_gate
def run_gate(*arguments):
    print("{PEAK}", re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1], flush=True)
    gate(*arguments)
train.run_gate = run_gate
sys.argv[0] = "refshard"
cli.run()
"""
    return [sys.executable, "-c", program]


def environment(more: Mapping[str, Any]) -> dict[str, str]:
    """Give a process's environment: this one's, and more."""
    own = {"OMP_NUM_THREADS": 1, "PYTHONPATH": Path(__file__).parents[2]}
    return {**os.environ, **{key: str(value) for key, value in {**own, **more}.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of processes that train one policy under FSDP2.")
    parser.add_argument("--layers", type=int, default=24, help="layers of 15 MiB (default 24)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a folder that is deleted)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        config = make_run(folder, chosen.layers)
        subprocess.run(
            [*command(), "precompute", "--config", config], env=environment({}), check=True, stdout=subprocess.DEVNULL
        )
        size = (folder / "model" / "model.safetensors").stat().st_size / 2**20
        print(f"{size:,.0f} MiB of weights; peak memory until training begins:")
        policies = []
        for name, once in (("one copy is loaded", "true"), ("a copy in each process", "false")):
            sharded = f"train.fsdp_config={{cpu_ram_efficient_loading: {once}}}"
            measured = train(config, "-o", "train.fsdp=true", "-o", sharded)
            policies.append((folder / "policy" / "adapter_model.safetensors").read_bytes())
            print(f"{name}: {', '.join(f'rank {rank} {peak:,.0f} MiB' for rank, peak in enumerate(measured))}")
        print("the same policy" if policies[0] == policies[1] else "the policies differ")


if __name__ == "__main__":
    main()
