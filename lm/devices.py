"""What chips can do: peak rates and memory by the name that JAX gives a device.

Model FLOP utilization divides by the peak, so a wrong peak makes a wrong claim: a device that the
table does not name has no peak here, and no guess is made from a similar name.
"""

import contextlib
import dataclasses
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GB, GIB = 10**9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Vendor figures of one JAX device."""

    bf16_flops: float
    """Dense bfloat16 matrix products with float32 accumulation, FLOP/s; never the 2:4 sparse rate
    that data sheets print in the first line."""
    memory_bytes: int
    bandwidth: float
    """Of the device memory, bytes/s."""


# Keys are `jax.Device.device_kind`: the CUDA or HIP device name on GPUs; the names of
# jax/_src/tpu_info.py (`chip_version_from_device_kind`) on TPUs.
CHIPS: dict[str, Chip] = {
    # NVIDIA A100 data sheet (2021): 312 TFLOP/s, 624 with sparsity.
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * GB, 1.555e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GB, 2.039e12),
    "NVIDIA A100-PCIE-40GB": Chip(312e12, 40 * GB, 1.555e12),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 80 * GB, 1.935e12),
    # NVIDIA H100 data sheet: 1,979 (SXM), 1,513 (PCIe), 1,671 (NVL) TFLOP/s with sparsity, halved.
    "NVIDIA H100 80GB HBM3": Chip(989.4e12, 80 * GB, 3.35e12),
    "NVIDIA H100 PCIe": Chip(756e12, 80 * GB, 2.0e12),
    "NVIDIA H100 NVL": Chip(835.5e12, 94 * GB, 3.9e12),
    # NVIDIA H200 data sheet: the H100's rates (SXM 1,979, NVL 1,671 with sparsity), more memory.
    "NVIDIA H200": Chip(989.4e12, 141 * GB, 4.8e12),
    "NVIDIA H200 NVL": Chip(835.5e12, 141 * GB, 4.8e12),
    # NVIDIA GH200 data sheet, the 96 GB HBM3 version (480 GB is the CPU's memory).
    "NVIDIA GH200 480GB": Chip(989.4e12, 96 * GB, 4.0e12),
    # NVIDIA Blackwell architecture brief: 4,500 (HGX B200, 1,000 W) and 5,000 (GB200, 1,200 W)
    # TFLOP/s with sparsity, halved; memory as the HGX B200 and GB200 NVL72 data sheets give it.
    "NVIDIA B200": Chip(2250e12, 180 * GB, 8.0e12),
    "NVIDIA GB200": Chip(2500e12, 186 * GB, 8.0e12),
    # NVIDIA L4 and L40S data sheets: 242 and 733 TFLOP/s with sparsity; L40S prints 362.05 dense.
    "NVIDIA L4": Chip(121e12, 24 * GB, 300e9),
    "NVIDIA L40S": Chip(362.05e12, 48 * GB, 864e9),
    # AMD Instinct MI300X data sheet: 1,307.4 TFLOP/s, 2,614.9 with sparsity.
    "AMD Instinct MI300X": Chip(1307.4e12, 192 * GB, 5.3e12),
    # Google Cloud TPU system architecture pages (v4, v5e, v5p, v6e, TPU7x). v4 and v5p show one
    # device per chip (both TensorCores, the default); TPU7x shows two devices per chip, so its
    # row is half of the chip's 2,307 TFLOP/s, 192 GiB and 7,380 GB/s.
    "TPU v4": Chip(275e12, 32 * GIB, 1.2e12),
    "TPU v5 lite": Chip(197e12, 16 * GB, 819e9),
    "TPU v5e": Chip(197e12, 16 * GB, 819e9),
    "TPU v5": Chip(459e12, 95 * GIB, 2.765e12),
    "TPU v5p": Chip(459e12, 95 * GIB, 2.765e12),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1.638e12),
    "TPU v6e": Chip(918e12, 32 * GIB, 1.638e12),
    "TPU7x": Chip(2307e12 / 2, 96 * GIB, 7.38e12 / 2),
}


def peak_flops(device: Any) -> float | None:
    """Dense bf16 peak of a `jax.Device` in FLOP/s; None where the table does not know it (CPUs)."""
    chip = CHIPS.get(device.device_kind)
    return chip.bf16_flops if chip else None


def memory_in_use(devices: Iterable[Any]) -> int:
    """Peak bytes held by the fullest of `devices` (`jax.local_devices()`) since the start.

    Where devices keep no such count (CPUs) it is the peak resident set of this process.
    """
    peaks = []
    for device in devices:
        stats = device.memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            peaks.append(stats["peak_bytes_in_use"])
    if peaks:
        return int(max(peaks))
    return _peak_resident_set()


def memory_limit(devices: Iterable[Any]) -> int | None:
    """Bytes that the smallest of `devices` lets a program use; None where none says so (CPUs)."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return int(min(limits)) if limits and all(limits) else None


def _peak_resident_set() -> int:
    with contextlib.suppress(OSError):
        # Not getrusage on Linux: its peak outlives exec, so it may be that of the parent.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
