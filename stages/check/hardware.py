"""Memory and peak speed of a GPU by its name, from its vendor's data sheet."""

import re
from dataclasses import dataclass, replace

from pipeline.base.errors import ConfigError

__all__ = ["HARDWARE", "Hardware", "hardware_named"]

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device, and the number of them."""

    name: str
    memory: int
    """Bytes of one device, as sold; a driver takes about 1 GB of it."""
    tflops_16bit: float | None = None
    """Peak of one device in dense products of 16-bit numbers with float32 sums; None if unknown."""
    tflops_32bit: float | None = None
    """Peak in float32 without tensor cores, torch's default; None if unknown."""
    source: str = ""
    count: int = 1
    is_gpu: bool = True

    @property
    def label(self) -> str:
        return self.name if self.count == 1 else f"{self.count}x {self.name}"


# Gigabytes, then the two peaks for dense products: if a data sheet states the number with sparsity, half of it.
HARDWARE = {
    name: Hardware(name=name, memory=memory * GB, tflops_16bit=sixteen, tflops_32bit=thirty_two, source=source)
    for name, memory, sixteen, thirty_two, source in (
        ("h200-141gb", 141, 989, 67, "NVIDIA H200 data sheet (SXM)"),
        ("h100-80gb", 80, 989, 67, "NVIDIA H100 data sheet (SXM)"),
        ("a100-80gb", 80, 312, 19.5, "NVIDIA A100 80GB data sheet"),
        ("a100-40gb", 40, 312, 19.5, "NVIDIA A100 data sheet"),
        ("l40s-48gb", 48, 362, 91.6, "NVIDIA L40S data sheet"),
        ("rtx4090-24gb", 24, 165, 82.6, "NVIDIA Ada GPU architecture paper, appendix A"),
        ("a4000-16gb", 16, 76.7, 19.2, "NVIDIA RTX A4000 data sheet"),
        ("t4-16gb", 16, 65, 8.1, "NVIDIA T4 data sheet (float16; it has no bfloat16)"),
    )
}


def hardware_named(text: str) -> Hardware:
    """Read hardware as people write it: `h100-80gb`, `8xa100-80gb`, or memory alone, `2x24GB`.

    Raises:
        ConfigError: The hardware is not in the table; the message lists the table.
    """
    count, name = 1, text.strip().lower()
    if match := re.fullmatch(r"(\d+)\s*x\s*(.+)", name):
        count, name = int(match[1]), match[2]
    if count < 1:
        raise ConfigError(f"--hardware: must be at least one device, got {text}")
    if found := HARDWARE.get(name):
        return replace(found, count=count)
    if match := re.fullmatch(r"(\d+)gb", name):
        # Its speed is unknown.
        return Hardware(name=name, memory=int(match[1]) * GB, source="as given", count=count)
    raise ConfigError(
        f"--hardware: must be here, a memory like 24GB, or one of {', '.join(HARDWARE)}, got {text!r}. Put a number in "
        "front for several (8xh100-80gb)"
    )
