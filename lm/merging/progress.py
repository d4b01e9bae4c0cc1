"""One line that tells how far a merge is, how fast it goes and when it will be done."""

import threading
import time
from typing import TextIO

__all__ = ["Progress", "duration", "size"]


class Progress:
    """Counts bytes moved and elements finished, from any thread; `show` prints, from one.

    On a terminal the line is rewritten several times a second; elsewhere (a log) a new one is
    printed every ten seconds.

    Args:
      total: elements to be written.
      stream: where the line goes; None keeps silent.
    """

    def __init__(self, total: int, stream: TextIO | None = None):
        self.total, self.done, self.moved = total, 0, 0
        self._stream = stream
        self._live = stream is not None and stream.isatty()
        self._lock = threading.Lock()
        self._start = self._last = time.monotonic()
        self._width = 0
        self._before: int | None = None

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._start

    def add_bytes(self, count: int) -> None:
        """Bytes read or written."""
        with self._lock:
            self.moved += count

    def finish(self, elements: int) -> None:
        """Elements of the output that are done."""
        with self._lock:
            self.done += elements

    def show(self, what: str = "", last: bool = False) -> None:
        """Print the line, if it is time."""
        now = time.monotonic()
        if self._stream is None or not (last or now - self._last >= (0.25 if self._live else 10)):
            return
        self._last = now
        if self._before is None:  # what was finished by an earlier run says nothing about speed
            self._before = self.done
        text = self._text(what)
        if self._live:
            padded = text.ljust(self._width)
            self._width = len(text)
            self._stream.write("\r" + padded + ("\n" if last else ""))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def _text(self, what: str) -> str:
        seconds = max(self.seconds, 1e-6)
        share = self.done / self.total if self.total else 1.0
        parts = [
            f"merging {share:4.0%}",
            f"{size(self.moved)} moved, {size(self.moved / seconds)}/s",
        ]
        fresh = self.done - (self._before or 0)
        if what:
            parts.append(what)
        elif 0 < fresh and share < 1:
            left = (self.total - self.done) / fresh * seconds
            parts.append(f"{duration(left)} left")
        elif share >= 1:
            parts.append(f"done in {duration(seconds)}")
        return "  ".join(parts)


def size(count: float) -> str:
    """Bytes for people: 633 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds for people: 2 min 5 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
