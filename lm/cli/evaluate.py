"""`evaluate.py RUN_OR_CHECKPOINT`: loss, perplexity and bits per byte of text under a model.

Without --data flags the text is what the run held out; with them, any source, whole.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Literal

import tyro

from lm import exit_codes
from lm.cli.args import one_line_errors, refuse
from lm.config import ConfigError, check
from lm.train.config import DataConfig


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
    json: bool = False
    """Print one JSON object instead of lines."""

    def __post_init__(self):
        check(self.batch_size > 0, f"batch_size must be above 0, got {self.batch_size}")
        for name in ("sequence_length", "batches"):
            value = getattr(self, name)
            check(value is None or value > 0, f"{name} must be above 0, got {value}")


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says; exits with one of `lm.exit_codes`."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        from lm.train.checkpoint import CheckpointError

        try:
            with one_line_errors(EvaluateArgs):
                args = _parse(words)
            print(_run(args))
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
    run = run_config(words[0]).data
    source, path = _value(words, "--data.source"), _value(words, "--data.path")
    data = run
    if hf.is_hf(words[0]) and source is None and path is None and "--help" not in words:
        raise ConfigError(f"{words[0]} has no text of its own: give --data.path (or --data.source)")
    if source is None and path is not None:  # a path alone is other text of the run's kind
        source = "text" if run.source == "stdlib" else run.source
    # The run's own text, named again, keeps the run's way of holding out.
    if source and (source, path or "") != (run.source, run.path):
        # Another source shares only the tokenizer and the cache with the run's.
        data = DataConfig(source=source, path=path or "", tokenizer=run.tokenizer, cache=run.cache)
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

    from lm import hf, sharding
    from lm.data import eval_batches, open_stores
    from lm.train.evaluation import evaluate
    from lm.train.load import load_run
    from lm.train.loop import enable_compilation_cache
    from lm.train.metrics import jsonable
    from lm.train.quantization import make_quantization
    from lm.train.step import make_eval_step

    enable_compilation_cache()
    run = load_run(args.model, args.step, args.dtype)
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
    mesh = sharding.make_mesh({"data": 1})
    quantization = make_quantization(config)
    plug = quantization and quantization.for_evaluation()
    step = jax.jit(make_eval_step(config, plug))
    began = time.monotonic()
    with jax.set_mesh(mesh):
        params = jax.device_put(run.params, sharding.replicated(mesh))
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
