"""EleutherAI's lm-evaluation-harness on our models, through its Python interface.

`HarnessModel` answers the harness's requests (objects whose `args` hold text) and needs no package
of it; `run_tasks` hands it over and needs the extra `eval`.
"""

import difflib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from lm.config import ConfigError, check
from lm.data.tokenizer import Tokenizer
from lm.generate import Sampling
from lm.scoring import Scorer

__all__ = ["HarnessModel", "Request", "run_tasks"]

MAX_TOKENS = 256
"""Tokens drawn where a task does not say how many, as in the harness's own models."""
_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Request(Protocol):
    """What the harness asks: `lm_eval.api.instance.Instance`."""

    @property
    def args(self) -> tuple: ...


class HarnessModel:
    """A model that answers requests made of text."""

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        *,
        prefix: Sequence[int] | None = None,
        end_ids: Sequence[int] = (),
        template: Any = None,
        seed: int = 0,
        progress: bool = False,
    ):
        """Args:
        scorer: the model.
        tokenizer: its tokenizer; names of special tokens in texts are read as these tokens.
        prefix: tokens in front of every text; None is the tokenizer's separator.
        end_ids: tokens that end what is generated, besides the tokenizer's own.
        template: a `lm.data.chat_template.ChatTemplate`, for tasks as conversations.
        seed: of what is drawn at a temperature.
        progress: show bars on stderr.
        """
        from lm.data.chat import text_encoder

        self.scorer, self.tokenizer, self.template = scorer, tokenizer, template
        self.prefix = [tokenizer.separator_id] if prefix is None else list(prefix)
        self.ends = {*end_ids, tokenizer.separator_id, tokenizer.end_id, tokenizer.eos_id} - {None}
        self.started = False
        self._encode = text_encoder(tokenizer)
        self._seed, self._progress = seed, progress

    @property
    def before(self) -> int:
        """The token that stands before a text without context."""
        return self.prefix[-1] if self.prefix else self.tokenizer.separator_id

    def encode(self, text: str) -> list[int]:
        """Tokens of a text behind the prefix, which is not put there twice."""
        ids = self._encode(text)
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of its continuation, as they are when tokenized together.

        Blanks that end the context belong to the continuation: tokens begin with them.
        """
        bare = context.rstrip()
        if not bare:
            return [self.before], self._encode(context + continuation)
        context, continuation = bare, context[len(bare) :] + continuation
        front = self.encode(context)
        return front, self.encode(context + continuation)[len(front) :]

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of (context, continuation)."""
        pairs = [self.split(*request.args) for request in requests]
        longest = max((len(continuation) for _, continuation in pairs), default=0)
        check(
            longest <= self.scorer.max_length,
            f"a continuation has {longest} tokens, and the model reads {self.scorer.max_length}: "
            "leave out such tasks",
        )
        with self._bar(len(pairs), "log-likelihoods") as done:
            return self.scorer.loglikelihoods(pairs, done)

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Log-likelihood in nats of whole texts, (text,)."""
        texts = [self._encode(request.args[0]) for request in requests]
        with self._bar(None, "windows") as done:
            return self.scorer.rolling(texts, self.before, done)

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """What follows each context, up to (without) the first of the texts in `until`.

        A request is (context, settings): until, max_gen_toks (or another name for it), do_sample,
        temperature, top_k, top_p. Without do_sample or a temperature the likeliest tokens are
        taken.
        """
        found = [""] * len(requests)
        groups: dict[tuple, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(_settings(request.args[1]), []).append(index)
        with self._bar(len(requests), "texts") as done:
            for (stops, count, sampling), members in groups.items():
                drawn = self.scorer.continuations(
                    [self.encode(requests[index].args[0]) or [self.before] for index in members],
                    max_tokens=count,
                    sampling=sampling,
                    finished=self._finished(stops),
                    seed=self._seed,
                    done=done,
                )
                for index, ids in zip(members, drawn, strict=True):
                    found[index] = self._text(ids, stops)
        return found

    def stop_ids(self, stops: tuple[str, ...]) -> set[int]:
        """Stops that are one token, which may be a special one, that no decoded text shows."""
        encoded = (self._encode(stop) for stop in stops)
        return {ids[0] for ids in encoded if len(ids) == 1}

    def _finished(self, stops: tuple[str, ...]) -> Callable[[list[int]], bool]:
        ends = self.ends | self.stop_ids(stops)
        # A stop ends in the newest token; every token before it holds a byte of it or more.
        reach = max((len(stop.encode()) for stop in stops), default=0) + 4

        def finished(ids: list[int]) -> bool:
            if ids[-1] in ends:
                return True
            tail = self._decode(ids[-reach:])
            return any(stop in tail for stop in stops)

        return finished

    def _text(self, ids: list[int], stops: tuple[str, ...]) -> str:
        ends = self.ends | self.stop_ids(stops)
        end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        text = self._decode(ids[:end])
        for stop in stops:
            text = text.partition(stop)[0]
        return text

    def _decode(self, ids: list[int]) -> str:
        # Ids between the tokenizer's size and the rounded-up vocabulary stand for nothing.
        return self.tokenizer.decode([i for i in ids if i < self.tokenizer.vocab_size])

    def _bar(self, total: int | None, what: str):
        from tqdm import tqdm

        self.started = True
        return _Bar(tqdm(total=total, desc=what, disable=not self._progress, leave=False))


class _Bar:
    def __init__(self, bar):
        self._bar = bar

    def __enter__(self) -> Callable[[int], object]:
        return self._bar.update

    def __exit__(self, *error) -> None:
        self._bar.close()


def _settings(given: dict[str, Any]) -> tuple[tuple[str, ...], int, Sampling]:
    """(stops, most tokens, sampling) of a request, hashable."""
    until = given.get("until") or []
    stops = (until,) if isinstance(until, str) else tuple(until)
    count = next((given[name] for name in _COUNTS if given.get(name) is not None), MAX_TOKENS)
    heat = float(given.get("temperature") or 0.0)
    sample = given.get("do_sample")
    if sample is None or given.get("temperature") is not None:
        sample = heat > 0 and sample is not False
    top_k, top_p = int(given.get("top_k") or 0), float(given.get("top_p") or 1.0)
    if not sample:
        return tuple(s for s in stops if s), int(count), Sampling(temperature=0.0)
    sampling = Sampling(temperature=heat or 1.0, top_k=top_k, top_p=top_p)
    return tuple(s for s in stops if s), int(count), sampling


def run_tasks(
    answering: HarnessModel,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    chat: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate a model on tasks of the harness.

    Args:
      answering: the model.
      tasks: names of tasks that the harness knows, or paths of tasks in YAML.
      num_fewshot: examples in front of each question; None leaves it to the task.
      limit: at most this many questions of each task (below 1 a share of them).
      chat: put contexts into the chat template.
      seed: of the choice of examples.

    Returns:
      The harness's results, without the single answers: "results", "n-shot", "versions", ...

    Raises:
      ConfigError: the harness is not installed, a task is not known or its data cannot be read.
    """
    lm_eval = _import("lm_eval")
    check(not chat or answering.template is not None, "this model has no chat template")
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        check(file.is_file(), f"task {file}: there is no such file")
    # Reading the list of all tasks takes seconds; of files only groups name others.
    listed = len(files) < len(tasks) or any("group:" in file.read_text() for file in files)
    manager = _import("lm_eval.tasks").TaskManager(include_defaults=listed)
    for task in tasks:
        known = task in manager.all_tasks or any(c in task for c in "*?")
        if Path(task) not in files and not known:
            near = difflib.get_close_matches(task, manager.all_tasks, 1)
            hint = f": did you mean {near[0]}?" if near else "; give its name or a .yaml file"
            raise ConfigError(f"the harness has no task {task!r}{hint}")
    try:
        results = lm_eval.simple_evaluate(
            _as_lm(answering),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            batch_size=answering.scorer.batch_size,
            limit=limit,
            log_samples=False,
            apply_chat_template=chat,
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except Exception as error:
        if answering.started or isinstance(error, ConfigError):
            raise
        # Tasks are read by many libraries, from files and the network: no common base.
        raise ConfigError(
            f"the tasks {', '.join(tasks)} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    assert results is not None
    return {key: value for key, value in results.items() if key != "samples"}


def _import(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs EleutherAI's lm-evaluation-harness: pip install 'aniso[eval]' ({error})"
        ) from error


def _as_lm(answering: HarnessModel) -> Any:
    """The model as the harness's own class."""
    base = _import("lm_eval.api.model").LM

    class Aniso(base):
        def loglikelihood(self, requests):
            return answering.loglikelihood(requests)

        def loglikelihood_rolling(self, requests):
            return answering.loglikelihood_rolling(requests)

        def generate_until(self, requests):
            return answering.generate_until(requests)

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return answering.template.render(chat_history, prompt=add_generation_prompt)[0]

        def chat_template(self, chat_template=False):
            return answering.template.source if chat_template else ""

        @property
        def tokenizer_name(self):
            return answering.tokenizer.fingerprint

    return Aniso()
