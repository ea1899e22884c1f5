"""Print what a bug report wants: versions, devices, and which optional packages are there."""

import json
import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import click

from pipeline.base.progress import say
from pipeline.base.tables import aligned
from pipeline.base.versions import library_versions, version_of

__all__ = ["environment", "show_environment"]

_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "WORLD_SIZE"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
)
"""Variables that change what a run does, and that hold no secret and no path"""


@click.command("env", short_help="Versions and devices, for a bug report.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def show_environment(as_json: bool) -> None:
    """Print versions, devices and optional packages, for a bug report. No path and no token is among them."""
    found = environment()
    if as_json:
        say(json.dumps(found, indent=2))
        return
    for section, entries in found.items():
        say(f"{section}\n" + "\n".join(f"  {line}" for line in aligned(list(entries.items()), left=(0, 1))))


def environment() -> dict[str, dict[str, str]]:
    """Collect what a result depends on outside the settings, as text by section and name."""
    import torch

    versions = {**library_versions(), **{name: version_of(name) or "missing" for name in ("accelerate", "datasets")}}
    processor = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    machine = {"system": platform.platform(), "processor": processor}
    if hasattr(os, "sysconf"):
        machine["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    machine["threads"] = f"{torch.get_num_threads()} of torch"
    return {
        "versions": versions,
        "machine": machine,
        "devices": dict(_devices(torch)),
        "optional": dict(_optional()),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ} or {"none set": ""},
    }


def _devices(torch: Any) -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield "GPU", f"none visible (torch is built for {built})" if built else "none: torch is built for CPUs only"
    else:
        yield "CUDA", f"{torch.version.cuda or torch.version.hip}, NCCL {_nccl(torch)}"
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            # torch says that older GPUs support it too, as it emulates it there.
            bf16 = "bfloat16" if torch.version.hip or facts.major >= 8 else "bfloat16 emulated"
            capability = f"capability {facts.major}.{facts.minor}"
            yield f"GPU {index}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {capability}, {bf16}"
    if torch.backends.mps.is_available():
        yield "MPS", "there"


def _nccl(torch: Any) -> str:
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "missing"


def _optional() -> Iterator[tuple[str, str]]:
    """Yield each extra's packages, with their version or the command that installs them."""
    for line in metadata.requires("refshard") or ():
        match = re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", line)
        if match and match[2] != "test":
            version = version_of(match[1])
            yield match[1], f"{version} ({match[2]})" if version else f"missing (pip install 'refshard[{match[2]}]')"
    yield "deepspeed", version_of("deepspeed") or "missing"
