"""C for CPUs, where what XLA or NumPy have leaves half of the speed of memory or more.

`library()` compiles the *.c files beside this one for the processor at hand, by the system's C
compiler (`CC`, else the one that Python was built with, else `cc`), and keeps the result in
`ANISO_CACHE` (default ~/.cache/aniso). Without a compiler, or with ANISO_NATIVE=0, it is None, and
those who ask for it do the same work more slowly.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lm.files import atomic_write_bytes

__all__ = ["MOST_ROWS", "few_rows", "library", "takes_few_rows", "transpose"]

MOST_ROWS = 32
"""Most rows of x in `few_rows`."""
_SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
_FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-shared", "-fPIC")
_TUNED = (("-march=native",), ("-mcpu=native",), ())  # what this compiler knows, the best first
_SECONDS = 120  # a compiler takes two or three
_TARGETS = {False: "aniso_rows", True: "aniso_rows_t"}
_lock = threading.Lock()
_log = logging.getLogger(__name__)


def library() -> ctypes.CDLL | None:
    """The compiled code, its products known to XLA; None where there is none."""
    if os.environ.get("ANISO_NATIVE") == "0":
        return None
    with _lock:
        return _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        loaded = build()
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or b""
        _log.warning(
            "the C code of lm/native cannot be used (%s %s): generation on CPUs and loading of "
            "checkpoints are slower; ANISO_NATIVE=0 silences this",
            error,
            output.decode(errors="replace").strip()[:500],
        )
        return None
    if loaded is None:
        return None
    for name in _TARGETS.values():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    loaded.aniso_transpose.restype = None
    loaded.aniso_transpose.argtypes = [ctypes.c_void_p, ctypes.c_int64] * 2 + [ctypes.c_int64] * 3
    return loaded


def build(flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The library for this processor or, with `flags`, for the one that they name.

    Returns:
      None where no C compiler is found.

    Raises:
      OSError, ValueError, subprocess.SubprocessError: the compiler fails or `CC` is no command
        line, or what was made cannot be loaded.
    """
    compiler = _compiler()
    if compiler is None:
        return None
    headers = jax.ffi.include_dir()
    parts = [*compiler, *_FLAGS, *flags, _processor()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in (*_SOURCES, Path(headers, "xla/ffi/api/c_api.h")):
        digest.update(source.read_bytes())
    path = _folder() / f"{digest.hexdigest()[:24]}.so"
    if path.is_file():
        with contextlib.suppress(OSError):  # damaged: made anew
            return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "library.so"
        code = [str(source) for source in _SOURCES if source.suffix == ".c"]
        command = [*compiler, *_FLAGS, f"-I{headers}", *code, "-o", str(made)]
        for tuned in (flags,) if flags else _TUNED:
            done = subprocess.run([*command, *tuned], capture_output=True, timeout=_SECONDS)
            if done.returncode == 0:
                break
        done.check_returncode()
        # A full disk, or one that runs no programs: this process alone has the library, then.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(path, made.read_bytes())
            return ctypes.CDLL(str(path))
        return ctypes.CDLL(str(made))


def _folder() -> Path:
    try:
        return Path(os.environ.get("ANISO_CACHE") or "~/.cache/aniso").expanduser() / "native"
    except RuntimeError:  # there is no home
        return Path(os.devnull)  # below which nothing can be written


def _compiler() -> list[str] | None:
    for words in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc"):
        command = shlex.split(words or "")
        if command and shutil.which(command[0]):
            return command
    return None


def _processor() -> str:
    """What it can do: a home may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return " ".join(platform.uname())
    named = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(named)}))


def takes_few_rows(x: Float[Array, "*N R D"], w: Float[Array, "*N _ _"]) -> bool:
    """Whether `few_rows` is for this product; x and w may be traced."""
    return (
        0 < x.shape[-2] <= MOST_ROWS
        and x.dtype == w.dtype
        and x.dtype in (jnp.float32, jnp.bfloat16)
        and x.size > 0
        and w.size > 0
        and library() is not None
    )


def few_rows(
    x: Float[Array, "*N R D"],
    w: Float[Array, "*N _ _"],
    *,
    transposed: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "*N R F"]:
    """x w, or x w^T, for few rows of x on a CPU, summed in float32. It has no gradient.

    At 2048 x 768 and 8 rows on a 2-core Zen 4 it reads bfloat16 weights at 24 GB/s and float32 ones
    at 20; XLA's own product at 12 and 13.

    Args:
      x: inputs, float32 or bfloat16.
      w: weights of the same type, [*N, D, F], or [*N, F, D] if `transposed`.
      transposed: how w lies in memory.
      dtype: of the result, float32 or bfloat16; None is that of x.

    Raises:
      RuntimeError: there is no library (`takes_few_rows` is False).
      ValueError: the shapes do not fit.
    """
    if x.shape[:-2] != w.shape[:-2] or x.shape[-1] != w.shape[-1 if transposed else -2]:
        raise ValueError(f"x {x.shape} and w {w.shape} do not fit, transposed={transposed}")
    if library() is None:
        raise RuntimeError("few_rows needs the C code of lm/native: is there a C compiler?")
    shape = (*x.shape[:-1], w.shape[-2 if transposed else -1])
    result = jax.ShapeDtypeStruct(shape, dtype or x.dtype)
    return jax.ffi.ffi_call(_TARGETS[transposed], result, vmap_method="sequential")(x, w)


def transpose(source: np.ndarray, target: np.ndarray) -> bool:
    """target[j, i] = source[i, j], and True; False, and nothing done, where this code cannot.

    Args:
      source: [R, C] of 2 or 4 bytes an element, its rows contiguous.
      target: [C, R] of as many bytes an element, its rows contiguous.
    """
    size = source.itemsize
    rows, columns = source.shape
    fits = (
        size == target.itemsize
        and target.flags.writeable
        and target.shape == (columns, rows)
        and size in (2, 4)
    )
    contiguous = source.strides[1] == target.strides[1] == size
    if not fits or not contiguous or (loaded := library()) is None:
        return False
    loaded.aniso_transpose(
        target.ctypes.data, target.strides[0], source.ctypes.data, source.strides[0],
        rows, columns, size,
    )  # fmt: skip
    return True
