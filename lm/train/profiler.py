"""A window of steps under the JAX profiler."""

from pathlib import Path

import jax

from lm.train.config import RunConfig


class Profiler:
    """Traces a window of steps into OUT/profile, for TensorBoard or Perfetto."""

    def __init__(self, config: RunConfig, out: Path):
        self._first = config.profile.start
        self._end = config.profile.start + config.profile.steps
        self._folder = out / "profile"
        self._running = False

    def before(self, step: int) -> None:
        """Start or stop the trace if the step about to be dispatched is the first in or out."""
        if self._first <= step < self._end and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._running and step >= self._end:
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_) -> None:
        self._stop()
