"""SIGTERM and Ctrl-C: finish the step, save, leave."""

import signal

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """Remembers that the run was asked to stop, at a step that all processes agree on.

    With one process, SIGTERM and SIGINT set a flag. With several, JAX's preemption service has
    the handler of SIGTERM: a notice to one process stops all of them at the same step. A second
    signal of the same kind acts as if this class were not there.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        kinds = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        for kind in kinds:
            try:
                self._previous[kind] = signal.signal(kind, self._receive)
            except ValueError:  # not the main thread: the caller handles signals
                break
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _receive(self, number, frame) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for kind, handler in self._previous.items():
            signal.signal(kind, handler)
        self._previous = {}

    def stop_after(self, step: int) -> bool:
        """Whether to stop now that `step` is done; every process must ask at every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.received = self.received or signal.SIGTERM
            return True
        # A lone Ctrl-C among several processes cannot be agreed on: it ends the process, and the
        # others stop with it.
        if jax.process_count() > 1 and self.received is signal.SIGINT:
            raise KeyboardInterrupt
        return self.received is not None
