"""The C code as built for this processor, and for others whose instructions this one has too."""

import functools
import platform
from pathlib import Path

import jax
import pytest

from lm import native

# Width of the vectors, fused products and pairs of bfloat16 differ between these.
BUILDS = {
    "native": (),
    "avx512": ("-march=x86-64", "-mavx512f", "-mavx2", "-mfma"),
    "avx2": ("-march=x86-64", "-mavx2", "-mfma"),
    "x86-64": ("-march=x86-64",),
}
NEEDED = {"avx512": {"avx512f", "avx2", "fma"}, "avx2": {"avx2", "fma"}, "x86-64": set()}


def pytest_generate_tests(metafunc):
    if "built" in metafunc.fixturenames:
        metafunc.parametrize("built", BUILDS, indirect=True)


@functools.cache
def instructions() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return set(lines[0].split()) if lines else set()


@pytest.fixture
def compiled():
    """The library of this processor; skips where there is no compiler."""
    if (library := native.library()) is None:
        pytest.skip("no C compiler here, or ANISO_NATIVE=0")
    return library


@functools.cache
def build(name):
    library = native.build(BUILDS[name])
    for target in ("aniso_rows", "aniso_rows_t"):
        capsule = jax.ffi.pycapsule(getattr(library, target))
        jax.ffi.register_ffi_target(f"{target}_{name}", capsule, platform="cpu")
    return library


@pytest.fixture
def built(request, compiled):
    """(name, library) of a processor. Its products are the targets aniso_rows[_t]_<name>; for
    "native", without the suffix."""
    name = request.param
    if name == "native":
        return name, compiled
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an x86-64")
    if missing := NEEDED[name] - instructions():
        pytest.skip(f"this processor lacks {sorted(missing)}")
    return name, build(name)
