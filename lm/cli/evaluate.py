"""`evaluate.py RUN_OR_CHECKPOINT`: loss, perplexity and bits per byte of text under a model.

Without --data flags the text is what the run held out; with them, any source, whole. With --tasks
the model does tasks of EleutherAI's lm-evaluation-harness instead.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from lm import exit_codes
from lm.cli.args import one_line_errors, refuse
from lm.config import ConfigError, check
from lm.train.config import DataConfig, MeshConfig
from lm.train.config_data import TABLES


@dataclasses.dataclass(frozen=True)
class EvaluateArgs:
    """Which model, which text."""

    model: tyro.conf.Positional[str]
    """A run folder, one checkpoint in it (RUN/checkpoints/STEP), or a Hugging Face folder."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The text; the default is the run's. The tokenizer is always the run's."""
    split: Literal["auto", "valid", "train", "all"] = "auto"
    """Which documents; auto is valid for the run's own text and all for any other."""
    batch_size: int = 16
    """Sequences per batch."""
    sequence_length: int | None = None
    """Tokens per sequence; None is the run's."""
    batches: int | None = None
    """At most this many batches, spread evenly over the text; None is all of it."""
    step: int | None = None
    """Checkpoint to take; None is the newest good one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype that a Hugging Face folder is loaded in; None keeps its own."""
    task: str | None = None
    """Of a model merged by surgery: whose corrections act, or none."""
    json: bool = False
    """Print one JSON object instead of lines."""
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=1))
    """Devices to work on."""
    tasks: str = ""
    """Tasks of the lm-evaluation-harness (extra: eval) by name, and YAML files of others, with
    commas between them: arc_easy,my_task.yaml."""
    num_fewshot: int | None = None
    """tasks: examples in front of each question; None leaves it to the task."""
    limit: float | None = None
    """tasks: at most this many questions of each; below 1 a share of them."""
    apply_chat_template: bool = False
    """tasks: put questions into the tokenizer's chat template."""
    output: str = ""
    """tasks: JSON file for all results; must not exist."""

    def __post_init__(self):
        check(self.batch_size > 0, f"batch_size must be above 0, got {self.batch_size}")
        for name in ("sequence_length", "batches", "limit"):
            value = getattr(self, name)
            check(value is None or value > 0, f"{name} must be above 0, got {value}")
        few = self.num_fewshot
        check(few is None or few >= 0, f"num_fewshot must be 0 or more, got {few}")
        for name in ("num_fewshot", "limit", "apply_chat_template", "output"):
            given = getattr(self, name) not in (None, False, "")
            check(bool(self.tasks) or not given, f"{name} is for tasks: name some with --tasks")
        exists = bool(self.output) and Path(self.output).exists()
        check(not exists, f"{self.output} is there already: choose another --output")


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says; exits with one of `lm.exit_codes`."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        from lm.train.checkpoint import CheckpointError

        try:
            with one_line_errors(EvaluateArgs):
                args = _parse(words)
            print(_run_tasks(args) if args.tasks else _run(args))
        except CheckpointError as error:
            print(f"evaluate.py: error: {error}", file=sys.stderr)
            raise SystemExit(exit_codes.STORAGE) from None
    except ConfigError as error:
        refuse("evaluate.py", str(error))


def _parse(words: list[str]) -> EvaluateArgs:
    """Flags over the run's own data configuration, so that only differences need be given."""
    from lm import hf
    from lm.train.load import run_config

    if not words or words[0] in ("-h", "--help"):
        return tyro.cli(EvaluateArgs, args=words, description=__doc__)
    if words[0].startswith("-"):
        raise ConfigError(f"the run comes first: evaluate.py RUN ... {words[0]}")
    run = run_config(words[0], _value(words, "--task")).data
    source, path = _value(words, "--data.source"), _value(words, "--data.path")
    data = run
    tasks, texts = _value(words, "--tasks"), (source, path) != (None, None)
    if hf.is_hf(words[0]) and not texts and tasks is None and "--help" not in words:
        raise ConfigError(
            f"{words[0]} has no text of its own: give --data.path (or --data.source), or --tasks"
        )
    if tasks is not None and texts:
        raise ConfigError("--tasks bring their own texts: leave out --data.source and --data.path")
    if source is None and path is not None:  # a path alone is other text of the run's kind
        source = "text" if run.source == "stdlib" else run.source
    # The run's own text, named again, keeps the run's way of holding out.
    if source and (source, path or "") != (run.source, run.path):
        # Another source shares only the tokenizer and the cache with the run's.
        data = DataConfig(source=source, path=path or "", tokenizer=run.tokenizer, cache=run.cache)
        if run.format == "chat" and source in TABLES:
            data = dataclasses.replace(data, format="chat", chat_template=run.chat_template)
    default = EvaluateArgs(model=words[0], data=data)
    return tyro.cli(EvaluateArgs, args=words, default=default, description=__doc__)


def _value(words: list[str], flag: str) -> str | None:
    for i, word in enumerate(words):
        if word == flag and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(flag + "="):
            return word.removeprefix(flag + "=")
    return None


def _run(args: EvaluateArgs) -> str:
    import jax

    from lm import hf, model, sharding
    from lm.data import eval_batches, open_stores
    from lm.train.evaluation import evaluate
    from lm.train.load import load_run
    from lm.train.loop import enable_compilation_cache
    from lm.train.metrics import jsonable
    from lm.train.quantization import make_quantization
    from lm.train.step import make_eval_step

    enable_compilation_cache()
    run = load_run(args.model, args.step, args.dtype, args.task)
    config = run.config
    foreign = hf.is_hf(args.model)
    texts = (args.data.source, args.data.path), (config.data.source, config.data.path)
    own = texts[0] == texts[1] and not foreign
    split = ("valid" if own else "all") if args.split == "auto" else args.split
    stores = open_stores(dataclasses.replace(args.data, tokenizer=config.data.tokenizer))
    chosen = [
        pair for name in ("train", "valid") if split in (name, "all") for pair in stores[name]
    ]
    length = args.sequence_length or config.sequence_length
    if length > config.model.max_context:
        raise ConfigError(
            f"sequence_length {length} exceeds the model's max_context {config.model.max_context}"
        )
    mesh = sharding.make_mesh(dataclasses.asdict(args.mesh))
    sharding.check_mesh(config.model, args.batch_size, 1, mesh)
    quantization = make_quantization(config)
    plug = quantization and quantization.for_evaluation()
    step = jax.jit(make_eval_step(config, plug))
    began = time.monotonic()
    with jax.set_mesh(mesh):
        params = jax.device_put(run.params, model.shardings(config.model, mesh))
        result = evaluate(
            step,
            params,
            eval_batches(chosen, args.batch_size, length, args.batches),
            sharding.batch_sharding(mesh),
        )
    seconds = time.monotonic() - began
    values = {
        "step": run.step,
        "split": split,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": int(result.tokens),
        "bytes": result.text_bytes,
        "seconds": round(seconds, 3),
    }
    if args.json:
        return json.dumps({name: jsonable(value) for name, value in values.items()})
    return "\n".join(
        [
            f"checkpoint      {args.model if foreign else f'step {run.step} of {args.model}'}",
            f"text            {args.data.source} {args.data.path} ({split}): "
            f"{values['tokens']:,} tokens, {result.text_bytes:,} bytes, {seconds:.1f} s",
            f"loss            {result.loss:.4f} nats per token",
            f"perplexity      {result.perplexity:.3f} per token",
            f"bits per byte   {result.bits_per_byte:.4f}",
        ]
    )


def _run_tasks(args: EvaluateArgs) -> str:
    from lm import sharding
    from lm.data.chat_template import load_template
    from lm.files import atomic_write_text
    from lm.harness import HarnessModel, run_tasks
    from lm.hf.tokenizer import end_ids
    from lm.scoring import Scorer
    from lm.train.load import load_run
    from lm.train.loop import enable_compilation_cache
    from lm.train.quantization import make_quantization

    enable_compilation_cache()
    run = load_run(args.model, args.step, args.dtype, args.task)
    config, template = run.config, None
    if args.apply_chat_template:
        template = load_template(config.data.tokenizer, config.data.chat_template)
    quantization = make_quantization(config)
    scorer = Scorer(
        config.model,
        run.params,
        batch_size=args.batch_size,
        max_length=args.sequence_length,
        mesh=sharding.make_mesh(dataclasses.asdict(args.mesh)),
        plug=quantization and quantization.for_evaluation(),
    )
    answering = HarnessModel(
        scorer,
        run.tokenizer,
        prefix=run.prefix,
        end_ids=end_ids(args.model),
        template=template,
        progress=True,
    )
    results = run_tasks(
        answering,
        [task.strip() for task in args.tasks.split(",") if task.strip()],
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        chat=args.apply_chat_template,
    )
    results = {"checkpoint": args.model, "step": run.step, **results}
    text = json.dumps(results, indent=1, default=_plain)
    if args.output:
        try:
            atomic_write_text(args.output, text + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write --output {args.output}: {error.strerror}") from error
    return text if args.json else _table(results)


def _plain(value: Any) -> Any:
    """Numbers of NumPy as numbers; whatever else the harness keeps (functions, types) by name."""
    return value.item() if hasattr(value, "item") else str(value)


def _table(results: dict[str, Any]) -> str:
    """One line for each metric of each task, with its standard error."""
    lines = []
    for task, values in sorted(results["results"].items()):
        shots = results.get("n-shot", {}).get(task, 0)
        for key, value in values.items():
            metric, comma, variant = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
                continue
            error = values.get(f"{metric}_stderr,{variant}")
            error = f" +- {error:.4f}" if isinstance(error, float) else ""
            name = metric if variant == "none" else f"{metric} ({variant})"
            lines.append(f"{task:<24} {shots}-shot  {name:<20} {value:.4f}{error}")
    return "\n".join(lines)
