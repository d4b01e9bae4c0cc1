"""Compiler flags that let communication overlap with computation, by backend and version.

XLA leaves several passes off that help a job on many devices, because they cost memory or compile
time. The rows of `CHOICES` turn on those that their makers recommend for training. A row is for one
backend, is left out where there is nothing to overlap (one device, one slice), and gives way as a
whole to a user who sets any of its flags. An unknown flag aborts the process, so flags of
`XLA_FLAGS` are tried in a child process first (a third of a second), and those of
`LIBTPU_INIT_ARGS`, which only a TPU can try, are bound to the versions of libtpu that know them.
"""

import contextlib
import dataclasses
import glob
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal

from lm import distributed

_LEVELS = "https://openxla.org/xla/gpu_optimization_levels"
_GUIDANCE = "https://openxla.org/xla/flags_guidance"
_MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext/blob/main/benchmarks/xla_flags_library.py"


@dataclasses.dataclass(frozen=True)
class Choice:
    """Flags that belong together."""

    name: str
    backend: Literal["gpu", "tpu"]
    needs: Literal["devices", "slices"]
    """What there must be several of."""
    flags: Mapping[str, str]
    why: str
    source: str
    versions: tuple[str, str] = ("", "")
    """First and last version of libtpu seen to know the flags."""

    @property
    def variable(self) -> str:
        return "XLA_FLAGS" if self.backend == "gpu" else "LIBTPU_INIT_ARGS"


CHOICES = (
    Choice(
        "latency_hiding",
        "gpu",
        "devices",
        {"xla_gpu_enable_latency_hiding_scheduler": "true"},
        "orders the program so that collectives run while matrices are multiplied; off by default",
        f"{_LEVELS}; set in NVIDIA's JAX images, https://docs.nvidia.com/jax-toolbox",
    ),
    Choice(
        "pipelined_collectives",
        "gpu",
        "devices",
        {
            "xla_gpu_enable_pipelined_all_gather": "true",
            "xla_gpu_enable_pipelined_reduce_scatter": "true",
            "xla_gpu_enable_pipelined_all_reduce": "true",
        },
        "lets the weights of the next layer be gathered, and the gradients of the last one be "
        "reduced, during the current iteration of the loop over layers",
        _LEVELS,
    ),
    Choice(
        "pipelined_all_gather",
        "tpu",
        "devices",
        {
            "xla_should_allow_loop_variant_parameter_in_chain": "enabled",
            "xla_should_add_loop_invariant_op_in_chain": "enabled",
            "xla_tpu_enable_ici_ag_pipelining": "true",
        },
        "pipelines all-gathers between chips over the loop over layers; the three work together",
        _GUIDANCE,
        versions=("0.0.46", "0.0.52"),
    ),
    Choice(
        "data_parallel_overlap",
        "tpu",
        "slices",
        {
            "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
            "xla_tpu_data_parallel_opt_different_sized_ops": "true",
        },
        "overlaps the reduction of gradients between slices, which is slow, with the backward pass",
        f"{_MAXTEXT} (DATA_PARALLEL_OVERLAP)",
        versions=("0.0.46", "0.0.52"),
    ),
)


@dataclasses.dataclass(frozen=True)
class Target:
    """What the flags are chosen for."""

    backend: Literal["cpu", "gpu", "tpu"]
    devices: int
    """0 where only the device runtime could tell: that counts as several."""
    slices: int = 1
    libtpu: str = ""


applied: dict[str, Any] = {"mode": "off", "added": {}, "left_out": {}}
"""What `apply` did last in this process, for the run's environment.json."""


def apply(mode: str, env: MutableMapping[str, str] = os.environ) -> dict[str, Any]:
    """Add the flags for this machine to `env`; call it before JAX touches a device.

    `mode` "off" adds none. Returns (and keeps in `applied`) `mode`, `added` (variable to words)
    and `left_out` (name of a choice to the reason).
    """
    global applied
    applied = {"mode": mode, "added": {}, "left_out": {}}
    if mode == "off":
        return applied
    target = find_target(env)
    chosen, applied["left_out"] = choose(target, env)
    for choice in chosen:
        words = [f"--{name}={value}" for name, value in choice.flags.items()]
        if choice.variable == "XLA_FLAGS" and not known(words):
            applied["left_out"][choice.name] = "unknown to the installed XLA"
            continue
        env[choice.variable] = " ".join([env.get(choice.variable, ""), *words]).strip()
        applied["added"].setdefault(choice.variable, []).extend(words)
    return applied


def choose(target: Target, env: Mapping[str, str]) -> tuple[list[Choice], dict[str, str]]:
    """The rows that fit, and the reasons why other rows of the backend do not."""
    chosen, left_out = [], {}
    for choice in CHOICES:
        if choice.backend != target.backend:
            continue
        theirs = set_by_user(env.get(choice.variable, ""))
        common = sorted(theirs & set(choice.flags))
        if getattr(target, choice.needs) == 1:
            left_out[choice.name] = f"one of {choice.needs}: nothing to overlap"
        elif common:
            left_out[choice.name] = f"{choice.variable} sets {', '.join(common)}"
        elif choice.backend == "tpu" and not _within(target.libtpu, choice.versions):
            left_out[choice.name] = (
                f"libtpu {target.libtpu or 'of unknown version'} is not in "
                f"{' to '.join(choice.versions)}, for which the flags were checked"
            )
        else:
            chosen.append(choice)
    return chosen, left_out


def set_by_user(text: str) -> set[str]:
    """Names of the flags in the words of XLA_FLAGS or LIBTPU_INIT_ARGS."""
    names = set(re.findall(r"(?:^|\s)--?([a-z0-9_]+)", text))
    return names | {name.removeprefix("no") for name in names}


def known(words: list[str]) -> bool:
    """Whether the installed jaxlib takes these words in XLA_FLAGS."""
    # XLA reads the variable when its first options are made; no device is touched.
    code = "from jaxlib import _jax; _jax.CompileOptions().executable_build_options.debug_options"
    env = os.environ | {"XLA_FLAGS": " ".join(words), "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def find_target(env: Mapping[str, str]) -> Target:
    """What this process will run on, without starting a backend."""
    backend = find_backend(env)
    if backend == "cpu":
        return Target("cpu", 1)
    devices = 0
    if backend == "gpu" and distributed.find(env) is None:
        visible = env.get("CUDA_VISIBLE_DEVICES")
        nodes = glob.glob("/dev/nvidia[0-9]*")
        devices = len(nodes) if visible is None else len([v for v in visible.split(",") if v])
    slices = env.get("MEGASCALE_NUM_SLICES") or "1"
    libtpu = ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        libtpu = importlib.metadata.version("libtpu")
    return Target(backend, devices, int(slices) if slices.isdecimal() else 1, libtpu)


def find_backend(env: Mapping[str, str]) -> Literal["cpu", "gpu", "tpu"]:
    """The backend that JAX will start: JAX_PLATFORMS, or else what is installed and plugged in."""
    names = {"cuda": "gpu", "gpu": "gpu", "tpu": "tpu", "cpu": "cpu"}
    if first := env.get("JAX_PLATFORMS", "").split(",")[0]:
        return names.get(first, "cpu")
    if glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"):
        if importlib.util.find_spec("libtpu"):
            return "tpu"
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if glob.glob("/dev/nvidia[0-9]*") and any(importlib.util.find_spec(p) for p in plugins):
        return "gpu"
    return "cpu"


def _within(version: str, bounds: tuple[str, str]) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text)[:3]]

    return bool(version) and numbers(bounds[0]) <= numbers(version) <= numbers(bounds[1])
