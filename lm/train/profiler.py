"""Windows of steps under the JAX profiler: one that the configuration names, others on demand."""

import signal
import sys
from pathlib import Path

import jax

from lm.train.config import RunConfig


class Profiler:
    """Traces windows of steps into OUT/profile, for TensorBoard (plugin `xprof`) or Perfetto.

    Besides the window of the configuration, SIGUSR1 makes the process trace its next
    `profile.on_signal` steps: `kill -USR1 PID` on the host that is of interest. A signal during a
    trace is ignored.
    """

    def __init__(self, config: RunConfig, out: Path):
        self._first = config.profile.start
        self._end = config.profile.start + config.profile.steps
        self._on_signal = config.profile.on_signal
        self._folder = out / "profile"
        self._running, self._stop_at = False, 0
        self._requested = False
        self._previous = None

    def before(self, step: int) -> None:
        """Start or stop the trace if the step about to be dispatched is the first in or out."""
        if self._running and step >= self._stop_at:
            self._stop()
        if not self._running:
            if self._first <= step < self._end:
                self._start(self._end)
            elif self._requested:
                self._start(step + self._on_signal)
                print(
                    f"process {jax.process_index()} traces steps {step + 1} to {self._stop_at} "
                    f"into {self._folder}",
                    file=sys.stderr,
                    flush=True,
                )
        self._requested = False

    def _request(self, number, frame) -> None:
        self._requested = True

    def _start(self, stop_at: int) -> None:
        jax.profiler.start_trace(str(self._folder))
        self._running, self._stop_at = True, stop_at

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

    def __enter__(self) -> "Profiler":
        if self._on_signal:
            try:
                self._previous = signal.signal(signal.SIGUSR1, self._request)
            except ValueError:  # not the main thread: the caller handles signals
                self._on_signal = 0
        return self

    def __exit__(self, *_) -> None:
        if self._on_signal:
            signal.signal(signal.SIGUSR1, self._previous)
        self._stop()
