"""Clocks and memory of the process or of its GPU, read the same way for every side."""

import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Reading:
    """What a pass took."""

    wall: float
    """Seconds"""
    cpu: float
    """Seconds of processor time, of all threads of the process"""
    loaded: int
    """Bytes held before the warm-up, with the model loaded"""
    peak: int
    """Most bytes held since then, warm-up included"""


class Gauge:
    """Stands still until `watch`, then follows memory; `start` and `stop` set the clocks."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._loaded = 0
        self._started = self._stopped = (0.0, 0.0)

    def watch(self) -> None:
        """Forget the memory's high-water mark: the model is loaded, and nothing has run yet."""
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._loaded = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self._loaded = _status("VmRSS")

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        """May be called again; the last call counts."""
        self._stopped = self._now()

    def read(self) -> Reading:
        peak = torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")
        wall, cpu = (stop - start for start, stop in zip(self._started, self._stopped, strict=True))
        return Reading(wall, cpu, self._loaded, peak)

    def _now(self) -> tuple[float, float]:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024
