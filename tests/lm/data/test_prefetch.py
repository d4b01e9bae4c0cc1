import gc
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lm.data.prefetch import Prefetcher, to_global

ROOT = Path(__file__).parents[3]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_come_in_order_and_ahead():
    made = []
    with Prefetcher(lambda step: made.append(step) or step * 10, start_step=5, depth=3) as batches:
        deadline = time.time() + 5
        while len(made) < 3 and time.time() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert made == [5, 6, 7]  # as deep as asked for, no deeper
        assert [batches.get(step) for step in range(5, 25)] == [10 * i for i in range(5, 25)]
        assert made == list(range(5, 5 + len(made)))
        with pytest.raises(ValueError, match="step 3 was asked for, but 25 is next"):
            batches.get(3)
    assert not threads()
    with pytest.raises(ValueError, match="closed"):
        for step in range(25, 40):
            batches.get(step)


def test_wait_seconds_is_the_time_the_device_would_starve():
    gate = threading.Event()
    with Prefetcher(lambda step: gate.wait(5) and step, depth=1) as batches:
        threading.Timer(0.2, gate.set).start()
        batches.get(0)
        assert 0.1 < batches.wait_seconds < 2
        time.sleep(0.2)
        batches.get(1)
        assert batches.wait_seconds < 0.05


def test_an_exception_surfaces_after_the_batches_before_it_with_its_traceback():
    def break_here(step):
        raise FileNotFoundError(f"shard of step {step}")

    with Prefetcher(lambda step: step if step < 2 else break_here(step), depth=4) as batches:
        assert [batches.get(0), batches.get(1)] == [0, 1]
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match="shard of step 2") as caught:
                batches.get(2)
            names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
            assert "break_here" in names
    assert not threads()


def test_a_forgotten_prefetcher_stops():
    batches = Prefetcher(lambda step: np.zeros(10), depth=2)
    batches.get(0)
    assert threads()
    del batches
    gc.collect()
    assert not threads()


def test_a_program_that_forgets_to_close_ends():
    code = (
        "import atexit, threading, weakref\n"
        "weakref.finalize(weakref, str)  # its exit hook comes first, so it runs last\n"
        "import jax\n"
        "atexit.register(lambda: print(threading.active_count()))\n"
        "from lm.data.prefetch import Prefetcher\n"
        "p = Prefetcher(lambda step: jax.numpy.zeros(4) + step, depth=2)\n"
        "print(p.get(0)[0])\n"
        "raise SystemExit(3)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert run.returncode == 3 and run.stdout == "0.0\n1\n" and not run.stderr


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((2, 2, 2), P(("data", "fsdp"))),
        ((2, 2, 2), P(("data", "fsdp"), "tensor")),
        ((8, 1, 1), P(("data", "fsdp"))),
        ((1, 2, 4), P("fsdp", None)),
        ((1, 1, 8), P()),
    ],
)
def test_to_global_places_every_row(shape, spec):
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    sharding = NamedSharding(mesh, spec)
    whole = {
        "tokens": np.arange(16 * 6, dtype=np.int32).reshape(16, 6),
        "weights": np.linspace(0, 1, 16 * 6, dtype=np.float32).reshape(16, 6),
    }
    asked = []

    def make_rows(rows):
        asked.append(rows)
        return {name: values[rows] for name, values in whole.items()}

    arrays = to_global(make_rows, sharding, 16)
    assert asked == [slice(0, 16)]  # one call although rows are on many devices
    for name, values in whole.items():
        assert arrays[name].sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_array_equal(np.asarray(arrays[name]), values)


PROCESS = """
import sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from lm.data.prefetch import to_global
me = jax.process_index()
auto = (AxisType.Auto,) * 2
whole = np.arange(8 * 3, dtype=np.int32).reshape(8, 3)

def check(devices, expected):
    asked = []
    def make_rows(rows):
        asked.append((rows.start, rows.stop))
        return {"x": whole[rows]}
    mesh = jax.sharding.Mesh(devices, ("data", "tensor"), axis_types=auto)
    x = to_global(make_rows, NamedSharding(mesh, P("data")), 8)["x"]
    assert asked == expected, (asked, expected)
    assert x.shape == (8, 3)
    for shard in x.addressable_shards:
        assert np.array_equal(np.asarray(shard.data), whole[shard.index])

devices = np.array(jax.devices())
check(devices.reshape(4, 1), [(4 * me, 4 * me + 4)])       # own rows only
check(devices.reshape(2, 2), [(4 * me, 4 * me + 4)])       # replicated inside a process
check(devices.reshape(2, 2).T, [(0, 8)])                   # replicated between processes
check(devices[[0, 2, 1, 3]].reshape(4, 1), [(2 * me, 2 * me + 2), (4 + 2 * me, 6 + 2 * me)])
print("fine")
"""


def test_each_process_makes_only_its_rows():
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(port), str(number)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for run in runs:
        out, error = run.communicate(timeout=120)
        assert run.returncode == 0 and out.strip() == "fine", error
