"""`generate.py RUN_OR_CHECKPOINT PROMPT`: print the prompt and what the model makes of it."""

import dataclasses
import os
import sys
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lm import exit_codes
from lm.cli.args import one_line_errors, refuse
from lm.config import ConfigError, check

if TYPE_CHECKING:
    from lm.train.load import LoadedRun


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
    """Text from a trained model, written as it is drawn."""

    model: tyro.conf.Positional[str]
    """A run folder, one checkpoint in it (RUN/checkpoints/STEP), or a Hugging Face folder."""
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")] = ""
    """Text to continue; empty starts a new document."""
    chat: bool = False
    """The prompt is what a user says: put it into the chat template, and print the answer alone."""
    system: str = ""
    """chat: what the system says before."""
    max_tokens: int | None = None
    """Most tokens to draw; None is 200, or fewer if the model's context ends before."""
    temperature: float = 0.8
    """Logits are divided by this; 0 takes the most likely token."""
    top_k: int = 0
    """Draw from this many most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens whose probabilities reach this sum."""
    seed: int = 0
    """Equal seeds draw equal text."""
    step: int | None = None
    """Checkpoint to take; None is the newest good one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype that a Hugging Face folder is loaded in; None keeps its own."""
    task: str | None = None
    """Of a model merged by surgery: whose corrections act, or none."""

    def __post_init__(self):
        surrogates = any(0xD800 <= ord(c) < 0xE000 for c in self.prompt)
        check(not surrogates, "the prompt is not valid UTF-8")
        check(self.chat or not self.system, "--system is for --chat: add it")
        good = self.max_tokens is None or self.max_tokens > 0
        check(good, f"max_tokens must be above 0, got {self.max_tokens}")
        check(0 <= self.seed < 2**31, f"seed must lie in [0, 2^31), got {self.seed}")


def main(argv: Sequence[str] | None = None) -> None:
    """Generate as the command line says; exits with one of `lm.exit_codes`."""
    try:
        with one_line_errors(GenerateArgs):
            args = tyro.cli(GenerateArgs, args=argv, description=__doc__)
        from lm.train.checkpoint import CheckpointError

        try:
            _run(args)
        except CheckpointError as error:
            print(f"generate.py: error: {error}", file=sys.stderr)
            raise SystemExit(exit_codes.STORAGE) from None
    except ConfigError as error:
        refuse("generate.py", str(error))
    except BrokenPipeError:  # `generate.py ... | head` is no error
        # What is left in the buffer would raise once more when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print()
        raise SystemExit(exit_codes.INTERRUPTED) from None


def _run(args: GenerateArgs) -> None:
    from lm.generate import Sampling, continue_text
    from lm.train.load import load_run
    from lm.train.loop import enable_compilation_cache

    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    enable_compilation_cache()
    run = load_run(args.model, args.step, args.dtype, args.task)
    tokenizer, prompt, prefix, shown = run.tokenizer, args.prompt, run.prefix, args.prompt
    if args.chat:
        tokenizer, prompt = _conversation(args, run)
        prefix, shown = [], ""
    model, count = run.config.model, args.max_tokens
    if count is None:
        room = model.max_context - len(tokenizer.encode(prompt)) - 1
        count = min(200, max(room, 1))
    pieces = continue_text(model, run.params, tokenizer, prompt, count, sampling, args.seed, prefix)
    # What cannot be continued is refused with the first piece, before anything is printed.
    first = next(pieces)
    print(shown + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _conversation(args: GenerateArgs, run: "LoadedRun") -> tuple[Any, str]:
    """A tokenizer that reads names of special tokens as these, and the rendered prompt."""
    from lm.data.chat import load_encoder

    data, tokenizer = run.config.data, run.tokenizer
    encoder = load_encoder(tokenizer, data.tokenizer, data.chat_template)
    messages = [{"role": "user", "content": args.prompt}]
    if args.system:
        messages.insert(0, {"role": "system", "content": args.system})
    reading = types.SimpleNamespace(
        encode=encoder.ids,
        decode=tokenizer.decode,
        vocab_size=tokenizer.vocab_size,
        separator_id=tokenizer.separator_id,
        end_id=tokenizer.end_id,
    )
    return reading, encoder.template.render(messages, prompt=True)[0]
