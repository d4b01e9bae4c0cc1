"""What a run ran on: environment.json in its folder.

Devices, hosts, mesh, versions, compiler flags, variables that change what libraries do, and the
state of the code. A restart that finds any of it different writes environment-2.json, and so on,
so that a change of speed or of losses can be traced to a change of machine.
"""

import datetime
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lm import devices, xla_flags
from lm.files import atomic_write_json
from lm.train.summary import versions

_VARIABLES = re.compile(
    r"(ANISO|JAX|XLA|LIBTPU|TPU|MEGASCALE|NCCL|CUDA|SLURM_(JOB|STEP|NTASKS|NNODES|RESTART)).*|"
    r"OMP_NUM_THREADS|GLIBC_TUNABLES|TF_GPU_ALLOCATOR"
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
_HOST_BYTES = 256


def record(folder: Path, mesh: Mesh) -> dict[str, Any]:
    """Describe this start and write it into `folder` unless the newest description there equals it.

    Every process must call it (hosts are gathered); process 0 writes. Returns the description.
    """
    found = describe(mesh)
    if jax.process_index() == 0:
        older = newest(folder)
        if older is None or _lasting(older[1]) != _lasting(json.loads(json.dumps(found))):
            number = older[0] + 1 if older else 1
            name = "environment.json" if number == 1 else f"environment-{number}.json"
            atomic_write_json(folder / name, found)
    return found


def newest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Number and content of the last description in `folder`; None without a readable one."""
    numbers = {}
    for path in folder.glob("environment*.json"):
        if match := re.fullmatch(r"environment(?:-(\d+))?\.json", path.name):
            numbers[int(match[1] or 1)] = path
    for number in sorted(numbers, reverse=True):
        try:
            return number, json.loads(numbers[number].read_text())
        except (OSError, ValueError):
            return number, {}  # unreadable: keep it, and write the next
    return None


def describe(mesh: Mesh) -> dict[str, Any]:
    """The content of environment.json."""
    device = mesh.devices.flat[0]
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "devices": {
            "kind": device.device_kind,
            "count": mesh.size,
            "platform": device.platform,
            "runtime": " ".join(device.client.platform_version.split()),
            "memory_bytes": devices.memory_limit(mesh.local_devices),
            **topology(mesh.devices.flat),
        },
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "hosts": _hosts(),
        "versions": versions(),
        "flags": {
            **xla_flags.applied,
            **{name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        },
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if _VARIABLES.fullmatch(name) and not _SECRET.search(name)
        },
        "git": git_state(),
        "system": {"platform": platform.platform(), "cpus": os.cpu_count()},
    }


def topology(found: Iterable[Any]) -> dict[str, Any]:
    """How chips of a TPU are wired: {"topology": "4x4x4", "slices": 2}; {} for other devices."""
    found = list(found)
    places = [device.coords for device in found if getattr(device, "coords", None)]
    if len(places) < len(found):
        return {}
    sizes = [max(axis) - min(axis) + 1 for axis in zip(*places, strict=True)]
    slices = {getattr(device, "slice_index", 0) for device in found}
    return {"topology": "x".join(map(str, sizes)), "slices": len(slices)}


def git_state(root: Path | None = None) -> dict[str, Any]:
    """Commit of the code that runs, and which files differ from it.

    Without a checkout (an image, a copy) it is what the launcher left in ANISO_COMMIT, as
    `git describe --always --dirty` prints it, or else None.
    """
    root = root or Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()).resolve() != root.resolve():
            raise FileNotFoundError  # installed inside of somebody else's checkout
        commit = git("rev-parse", "HEAD").strip()
        changed = [line[3:] for line in git("status", "--porcelain").splitlines()]
    except (OSError, subprocess.SubprocessError):
        text = os.environ.get("ANISO_COMMIT", "")
        return {"commit": text.removesuffix("-dirty") or None, "dirty": text.endswith("-dirty")}
    return {"commit": commit, "dirty": bool(changed), "changed": changed[:50]}


def _hosts() -> list[dict[str, Any]]:
    """Name and device count of each process, by its index."""
    mine = np.zeros(_HOST_BYTES + 1, np.int32)
    name = socket.gethostname().encode()[:_HOST_BYTES]
    mine[: len(name)] = np.frombuffer(name, np.uint8)
    mine[-1] = jax.local_device_count()
    rows = multihost_utils.process_allgather(mine) if jax.process_count() > 1 else mine[None]
    return [
        {
            "process": index,
            "host": bytes(row[:-1].astype(np.uint8)).rstrip(b"\0").decode(),
            "devices": int(row[-1]),
        }
        for index, row in enumerate(np.asarray(rows))
    ]


def _lasting(found: dict[str, Any]) -> dict[str, Any]:
    """Without what every start has anew."""
    variables = {k: v for k, v in found.get("variables", {}).items() if "SLURM_RESTART" not in k}
    return {k: v for k, v in found.items() if k not in ("started", "command")} | {
        "variables": variables
    }
