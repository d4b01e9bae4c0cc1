"""Evolutionary search of merge coefficients against any command that evaluates a model.

CMA-ES (Hansen 2016, arXiv 1604.00772; library cmaes) searches the numbers that a template marks
(`lm.merging.evolve_template`), each mapped to [0, 1], from their starts with step size 1/6 as
mergekit-evolve does; samples outside are drawn again. Every candidate is merged into a scratch
folder, the command runs with {model} replaced by that folder, and its score is read from the last
line of its output: a number, or a JSON object with "score". Scores are maximized unless told
otherwise. The first candidate is the start itself.

A candidate whose merge or command fails (exit code, no score, NaN, time limit) counts as worse than
all others, and the reason goes into the log; when all of the first candidates fail, the search
stops. CMA-ES only uses the order of scores.

OUT holds log.jsonl (one line per candidate, forced to the disk), best.yml (a plain configuration)
and, while a candidate is at work, scratch/. An interrupted search continues with the same command:
its samples are a function of the seed and the scores so far, so the log is replayed without running
anything (the models must not change meanwhile). A larger budget continues a finished search.
Cost: one merge and one evaluation per candidate; disk: one merged model.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm.files import atomic_write_text
from lm.merging.evolve_template import Template, load_template
from lm.merging.types import MergeError, StorageError

__all__ = ["Search", "evolve", "read_score"]

SIGMA = 1 / 6
LOG, BEST, SCRATCH = "log.jsonl", "best.yml", "scratch"


@dataclasses.dataclass(frozen=True)
class Search:
    """How to search."""

    command: str
    """Split as a shell would, but run without one; {model} and {config} are replaced."""
    budget: int = 100
    """Candidates to be evaluated in all."""
    seed: int = 0
    population: int | None = None
    """Candidates per generation; None: 4 + 3 ln(number of values)."""
    minimize: bool = False
    timeout: float | None = None
    """Seconds for one evaluation."""
    jobs: int = 2
    """Threads of a merge."""
    flavor: Any = None

    def __post_init__(self):
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise MergeError(f"the command cannot be split into words: {error}") from None
        if not any("{model}" in word for word in words):
            raise MergeError(f"the command must contain {{model}}, got {self.command!r}")
        if self.budget < 1:
            raise MergeError(f"the budget must be at least 1, got {self.budget}")
        if self.population is not None and self.population < 2:
            raise MergeError(f"the population must be at least 2, got {self.population}")


def evolve(
    template: Path, out: Path, search: Search, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Search, or continue to; gives the log's entry of the best candidate.

    Raises:
        MergeError: the template cannot work, `out` holds another search, every candidate fails.
        KeyboardInterrupt: the running command is ended first; the same call continues.
    """
    try:
        from cmaes import CMA
    except ImportError:
        raise MergeError(
            "the search needs the library cmaes: pip install 'aniso[evolve]'"
        ) from None
    import numpy as np

    found = load_template(template)
    with contextlib.closing(_Log(out, _identity(found, search))) as log:
        shutil.rmtree(out / SCRATCH, ignore_errors=True)
        _check(found, out, search)
        if log.entries:
            say(f"continuing: {len(log.entries)} candidates are in {out / LOG}")
        start = np.array([own.position for own in found.dimensions])
        bounds = np.tile([0.0, 1.0], (len(start), 1))
        state = CMA(start, SIGMA, bounds, seed=search.seed, population_size=search.population)
        _search(found, out, search, log, state, say)
        best = log.best(search.minimize)
        if best is None:
            last = log.entries[-1]["error"]
            raise MergeError(f"all {len(log.entries)} candidates failed; the last one: {last}")
        # Killed between the log's line and the configuration: the log decides.
        atomic_write_text(out / BEST, found.fill(list(best["values"].values())))
        return best


def _search(
    template: Template,
    out: Path,
    search: Search,
    log: "_Log",
    state: Any,
    say: Callable[[str], None],
) -> None:
    """Evaluate candidates until the budget is used up, or a whole first generation failed."""
    sign = 1.0 if search.minimize else -1.0
    generation: list[tuple[Any, float]] = []
    for index in range(search.budget):
        position = state.ask() if index else state.mean.copy()
        values = [own.value(x) for own, x in zip(template.dimensions, position, strict=True)]
        entry = log.replayed(index, values)
        if entry is None:
            entry = _evaluate(template, out, search, index, values)
            log.append(entry)
            best = log.best(search.minimize)
            if entry is best:
                atomic_write_text(out / BEST, template.fill(values))
            say(_line(entry, best, search.budget))
        score = entry["score"]
        generation.append((position, math.inf if score is None else sign * score))
        if len(generation) == state.population_size:
            if log.best(search.minimize) is None:
                return
            state.tell(generation)
            generation = []


def read_score(text: str) -> float:
    """The score in the last line of a command's output that is not blank.

    Raises:
        ValueError: it is neither a finite number nor {"score": a finite number}.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("the command printed nothing")
    try:
        value = json.loads(lines[-1])
        value = value["score"] if isinstance(value, dict) else value
        if isinstance(value, bool) or not math.isfinite(value):
            raise ValueError
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise ValueError(f"no finite score in the last line: {lines[-1][:200]!r}") from None
    return float(value)


class _Log:
    """log.jsonl: a line about the search, then one for every candidate, in order."""

    def __init__(self, out: Path, identity: dict[str, Any]):
        self.path = out / LOG
        self.entries: list[dict[str, Any]] = []
        self._held: Any = None
        try:
            if self.path.is_file():
                self._read(identity)
            elif out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise MergeError(f"{out} is not an empty folder: give another output folder")
            else:
                out.mkdir(parents=True, exist_ok=True)
                self._lock()
                self._write(identity)
        except OSError as error:
            self.close()
            raise StorageError(f"cannot write to {out}: {error.strerror}") from error
        except MergeError:
            self.close()
            raise

    def _lock(self) -> None:
        """Keep others out for as long as this object lives: they would clear our scratch folder."""
        self._held = open(self.path, "ab")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MergeError(f"another process is searching in {self.path.parent}") from None

    def close(self) -> None:
        """Let others search here."""
        if self._held is not None:
            self._held.close()

    def _read(self, identity: dict[str, Any]) -> None:
        self._lock()
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a kill may have left half a line
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise StorageError(f"{self.path} is damaged: {error}") from error
        if len(lines) < 2:  # nothing was evaluated: whatever it was may become another search
            os.truncate(self.path, 0)
            self._write(identity)
            return
        changed = [key for key in identity if lines[0].get(key) != identity[key]]
        if changed:
            raise MergeError(
                f"{self.path.parent} holds another search (different: {', '.join(changed)}): "
                "repeat the first command to continue it, or give another output folder"
            )
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        self.entries = lines[1:]

    def _write(self, value: dict[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write((json.dumps(value) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def replayed(self, index: int, values: list[float]) -> dict[str, Any] | None:
        """The entry of a candidate that was evaluated before."""
        if index >= len(self.entries):
            return None
        entry = self.entries[index]
        before = list(entry["values"].values())
        if not all(
            map(lambda a, b: math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9), before, values)
        ):
            raise MergeError(
                f"{self.path}: candidate {index} was {before}, the search now gives {values} "
                "(another version of cmaes or NumPy?): give another output folder"
            )
        return entry

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry, and force it to the disk."""
        try:
            self._write(entry)
        except OSError as error:
            raise StorageError(f"cannot write to {self.path}: {error.strerror}") from error
        self.entries.append(entry)

    def best(self, minimize: bool) -> dict[str, Any] | None:
        """The best entry so far; the first of equals."""
        good = [entry for entry in self.entries if entry["score"] is not None]
        if not good:
            return None
        return min(good, key=lambda entry: entry["score"] * (1 if minimize else -1))


def _identity(template: Template, search: Search) -> dict[str, Any]:
    text = json.dumps(template.data, sort_keys=True)
    return {
        "template": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        "command": search.command,
        "seed": search.seed,
        "population": search.population,
        "minimize": search.minimize,
        "flavor": search.flavor,
    }


def _session(template: Template, out: Path, search: Search, values: list[float]) -> Any:
    from lm.merging.session import Session

    scratch = out / SCRATCH
    scratch.mkdir(exist_ok=True)
    config = scratch / "config.yml"
    atomic_write_text(config, template.fill(values))
    return Session(
        config,
        scratch / "model",
        seed=search.seed,
        flavor=search.flavor,
        jobs=search.jobs,
        say=lambda _: None,
    )


def _check(template: Template, out: Path, search: Search) -> None:
    """Plan the first merge, so that a mistake in the template is told at once."""
    try:
        _session(template, out, search, [own.start for own in template.dimensions])
    finally:
        shutil.rmtree(out / SCRATCH, ignore_errors=True)


def _evaluate(
    template: Template, out: Path, search: Search, index: int, values: list[float]
) -> dict[str, Any]:
    began = time.monotonic()
    score, error = None, None
    try:
        _session(template, out, search, values).run()
        scratch = out / SCRATCH
        words = [
            word.replace("{model}", str(scratch / "model")).replace(
                "{config}", str(scratch / "config.yml")
            )
            for word in shlex.split(search.command)
        ]
        score = read_score(_run(words, search.timeout))
    except StorageError:
        raise  # a full disk is no property of the candidate
    except (MergeError, ValueError, OSError) as reason:
        error = str(reason)
    finally:
        shutil.rmtree(out / SCRATCH, ignore_errors=True)
    named = {own.name: value for own, value in zip(template.dimensions, values, strict=True)}
    seconds = round(time.monotonic() - began, 3)
    return {"index": index, "values": named, "score": score, "error": error, "seconds": seconds}


def _run(words: list[str], timeout: float | None) -> str:
    """Standard output of a command; ValueError if it fails. Nothing of it runs on afterwards."""
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what it starts can be ended with it
    )
    with child:
        try:
            text, errors = child.communicate(timeout=timeout)
        except BaseException as reason:  # the time limit, Ctrl-C
            os.killpg(child.pid, signal.SIGKILL)
            if isinstance(reason, subprocess.TimeoutExpired):
                limit = f"the command took more than {timeout:g} seconds"
                raise ValueError(limit) from None
            raise
    if child.returncode:
        lines = errors.strip().splitlines()
        last = f": {lines[-1][:300]}" if lines else ""
        raise ValueError(f"the command ended with exit code {child.returncode}{last}")
    return text


def _line(entry: dict[str, Any], best: dict[str, Any] | None, budget: int) -> str:
    values = ", ".join(f"{value:.4g}" for value in entry["values"].values())
    result = f"failed: {entry['error']}" if entry["score"] is None else f"{entry['score']:.6g}"
    top = "" if best is None else f" (best {best['score']:.6g})"
    return f"{entry['index'] + 1}/{budget} [{values}] {result}{top}"
