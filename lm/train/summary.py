"""What a finished run says: summary.json and one screen of text."""

import importlib.metadata
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.files import atomic_write_json
from lm.train.metrics import format_seconds, jsonable

PATHS = {
    "configuration": "config.json",
    "metrics": "metrics.jsonl",
    "loss curve": "loss.png",
    "report": "report.html",
    "checkpoints": "checkpoints",
    "summary": "summary.json",
}


def make_summary(
    *,
    recipe: str,
    out: str | os.PathLike,
    final_loss: float | None,
    eval_loss: float | None,
    bits_per_byte: float | None,
    tokens_per_second: float | None,
    params: int,
    steps: int,
    tokens: int,
    seconds: float,
    skipped_steps: int,
    device_kind: str,
    devices: int,
    train_words: Sequence[str],
    active_params: int | None = None,
) -> dict[str, Any]:
    """The content of summary.json.

    `final_loss` and `eval_loss` are in nats per token, `bits_per_byte` is that of the held-out
    data, `tokens_per_second` counts training alone, `seconds` everything. `train_words` are the
    words after train.py that describe the run (`lm.cli.args.run_flags`). `active_params`, of which
    a token meets those of its experts, is given where it differs from `params`.
    """
    out = Path(out)
    words = [w for w in train_words if not w.startswith("--out=") and w != "--resume"]
    resume = ["python", "scripts/train.py", *words, f"--out={out}", "--resume"]
    numbers = {
        "final_loss": final_loss,
        "eval_loss": eval_loss,
        "bits_per_byte": bits_per_byte,
        "tokens_per_second": tokens_per_second,
        "params": params,
        **({} if active_params in (None, params) else {"active_params": active_params}),
        "steps": steps,
        "tokens": tokens,
        "seconds": seconds,
        "skipped_steps": skipped_steps,
    }
    return {
        "recipe": recipe,
        **{name: jsonable(value) for name, value in numbers.items()},
        "device_kind": device_kind,
        "devices": devices,
        "paths": {name: str(out / file) for name, file in PATHS.items()},
        "commands": {
            "generate": shlex.join(["python", "scripts/generate.py", str(out), "def "]),
            "evaluate": shlex.join(["python", "scripts/evaluate.py", str(out)]),
            "resume": shlex.join(resume),
        },
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the numbers of a run depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    names += ("tokamax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_summary(path: str | os.PathLike, summary: Mapping[str, Any]) -> None:
    """Write summary.json in one step."""
    atomic_write_json(path, dict(summary))


def render_summary(summary: Mapping[str, Any]) -> str:
    """A summary as one screen of plain text: result, where everything lies, how to go on."""
    skipped = summary["skipped_steps"]
    devices = f"{summary['devices']} x {summary['device_kind']}"
    active = summary.get("active_params")
    active = f" ({active:,} active)" if active else ""
    facts = [
        ("recipe", f"{summary['recipe']}, {summary['params']:,} parameters{active}, on {devices}"),
        (
            "trained",
            f"{summary['steps']:,} steps, {summary['tokens']:,} tokens in "
            f"{format_seconds(summary['seconds'])}"
            + (f", {skipped:,} updates skipped" if skipped else ""),
        ),
        ("speed", f"{_number(summary['tokens_per_second'], ',.0f')} tokens/s"),
        ("training loss", f"{_number(summary['final_loss'], '.4f')} nats per token"),
        ("held-out loss", f"{_number(summary['eval_loss'], '.4f')} nats per token"),
        ("held-out text", f"{_number(summary['bits_per_byte'], '.4f')} bits per byte"),
    ]
    width = max(len(name) for name in [*(n for n, _ in facts), *summary["paths"]]) + 2
    lines = [f"{name:{width}}{text}" for name, text in facts]
    lines += ["", *(f"{name:{width}}{path}" for name, path in summary["paths"].items())]
    lines += ["", *(f"{name:{width}}{text}" for name, text in summary["commands"].items())]
    return "\n".join(lines) + "\n"


def _number(value: Any, spec: str) -> str:
    """A number in the given format; "not measured" for None; NaN and infinities by name."""
    if value is None:
        return "not measured"
    return value if isinstance(value, str) else format(value, spec)
