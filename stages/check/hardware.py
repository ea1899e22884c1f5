"""What a GPU is made of, by its name: memory and peak speed, from its vendor's data sheet."""

import re
from dataclasses import dataclass

from pipeline.base.errors import ConfigError

__all__ = [
    "HARDWARE",
    "Hardware",
    "hardware_named",
]

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device, and how many of them."""

    name: str
    memory: int
    """Bytes of one device, as sold; a driver keeps about 1 GB of it"""
    tflops_16bit: float | None = None
    """Peak of one device on dense products of 16-bit numbers, float32 sums; None where no data sheet says"""
    tflops_32bit: float | None = None
    """Peak on float32 numbers, without tensor cores, as torch computes unless it is told otherwise"""
    source: str = ""
    count: int = 1
    is_gpu: bool = True

    @property
    def label(self) -> str:
        return self.name if self.count == 1 else f"{self.count}x {self.name}"


# Dense products: where a data sheet gives the number with sparsity, half of it.
HARDWARE = {
    found.name: found
    for found in (
        Hardware(
            name="h200-141gb",
            memory=141 * GB,
            tflops_16bit=989,
            tflops_32bit=67,
            source="NVIDIA H200 data sheet (SXM)",
        ),
        Hardware(
            name="h100-80gb",
            memory=80 * GB,
            tflops_16bit=989,
            tflops_32bit=67,
            source="NVIDIA H100 data sheet (SXM)",
        ),
        Hardware(
            name="a100-80gb",
            memory=80 * GB,
            tflops_16bit=312,
            tflops_32bit=19.5,
            source="NVIDIA A100 80GB data sheet",
        ),
        Hardware(
            name="a100-40gb",
            memory=40 * GB,
            tflops_16bit=312,
            tflops_32bit=19.5,
            source="NVIDIA A100 data sheet",
        ),
        Hardware(
            name="l40s-48gb",
            memory=48 * GB,
            tflops_16bit=362,
            tflops_32bit=91.6,
            source="NVIDIA L40S data sheet",
        ),
        Hardware(
            name="rtx4090-24gb",
            memory=24 * GB,
            tflops_16bit=165,
            tflops_32bit=82.6,
            source="NVIDIA Ada GPU architecture paper, appendix A",
        ),
        Hardware(
            name="a4000-16gb",
            memory=16 * GB,
            tflops_16bit=76.7,
            tflops_32bit=19.2,
            source="NVIDIA RTX A4000 data sheet",
        ),
        Hardware(
            name="t4-16gb",
            memory=16 * GB,
            tflops_16bit=65,
            tflops_32bit=8.1,
            source="NVIDIA T4 data sheet (float16; it has no bfloat16)",
        ),
    )
}


_PLAIN_MEMORY = re.compile(r"(\d+)gb")


def hardware_named(text: str) -> Hardware:
    """Read hardware as people write it: `h100-80gb`, `8xa100-80gb`, or memory alone, `2x24GB`.

    Raises:
        ConfigError: There is no such hardware in the table; the message lists what there is.
    """
    count, name = 1, text.strip().lower()
    if match := re.fullmatch(r"(\d+)\s*x\s*(.+)", name):
        count, name = int(match[1]), match[2]
    if count < 1:
        raise ConfigError(f"--hardware {text}: at least one device")
    if found := HARDWARE.get(name):
        return Hardware(**{**vars(found), "count": count})
    if match := _PLAIN_MEMORY.fullmatch(name):
        # Nothing is known of its speed.
        return Hardware(name=name, memory=int(match[1]) * GB, source="as given", count=count)
    raise ConfigError(
        f"--hardware {text}: unknown; known are {', '.join(HARDWARE)}, a memory like 24GB, each with a number in front "
        "(8xh100-80gb), and here"
    )
