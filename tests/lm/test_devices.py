import subprocess
import sys
import types

import jax
import pytest

from lm.devices import CHIPS, memory_in_use, memory_limit, peak_flops


def device(kind, stats=None):
    return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)


@pytest.mark.parametrize(
    "kind,tflops",
    [("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("TPU v5 lite", 197), ("TPU v5", 459)],
)
def test_known_chips_have_their_dense_peak(kind, tflops):
    assert peak_flops(device(kind)) == pytest.approx(tflops * 1e12, rel=1e-3)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H300", "NVIDIA H200 ", "NVIDIA H100", "TPU v9"])
def test_unknown_chips_have_no_peak(kind):
    assert peak_flops(device(kind)) is None


def test_this_cpu_has_no_peak():
    assert peak_flops(jax.devices("cpu")[0]) is None


def test_tpu_rows_agree_with_jax_table():
    """JAX carries per-TensorCore figures of the TPUs; ours are per device."""
    info = pytest.importorskip("jax._src.tpu_info")
    if not hasattr(info, "_get_tpu_info_impl"):
        pytest.skip("JAX moved its table")
    seen = 0
    for kind, chip in CHIPS.items():
        version = info.chip_version_from_device_kind(kind)
        if version is None:
            continue
        cores = 2 if version.supports_megacore else 1
        theirs = info._get_tpu_info_impl(version, cores)
        assert chip.bf16_flops == pytest.approx(theirs.bf16_ops_per_second * cores, rel=0.01)
        assert chip.memory_bytes == pytest.approx(theirs.hbm_capacity_bytes * cores, rel=0.08)
        seen += 1
    assert seen >= 6


def test_bandwidth_and_memory_are_plausible():
    for kind, chip in CHIPS.items():
        assert 100 < chip.bf16_flops / chip.bandwidth < 600, kind  # FLOP per byte (ridge)
        assert 2**34 * 0.9 < chip.memory_bytes < 2**38, kind


def test_memory_is_that_of_the_fullest_device():
    full = [device("x", {"peak_bytes_in_use": n}) for n in (5, 9, 7)]
    assert memory_in_use(full) == 9


def test_limit_is_that_of_the_smallest_device():
    sizes = [device("x", {"bytes_limit": n}) for n in (9, 5, 7)]
    assert memory_limit(sizes) == 5
    assert memory_limit([*sizes, device("x", {})]) is None
    assert memory_limit([]) is None and memory_limit(jax.local_devices(backend="cpu")) is None


def test_memory_without_device_counts_is_the_peak_of_the_process():
    code = (
        "from lm.devices import memory_in_use\n"
        "before = memory_in_use([])\n"
        "block = bytearray(b'x' * 2**26)\n"
        "del block\n"
        "print(before, memory_in_use([]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 2**20 and 2**26 <= after - before < 2**28
    assert memory_in_use(jax.local_devices(backend="cpu")) > before
