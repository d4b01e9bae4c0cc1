"""AdaTask against joint AdamW on four domains of different size and difficulty.

    python scripts/reproduce_adatask.py --data-dir DIR            # the missing runs, then
    python scripts/reproduce_adatask.py --report                  # docs/results/adatask.md and .png

DIR holds DOMAIN.train.parquet and DOMAIN.valid.parquet with a column `text` for each of `DOMAINS`.
Every run trains the same byte-level decoder for the same number of steps on the same rows; two
domains fill 14 of the 16 rows of a batch, two have one row each. `--list`, `--limit N` and
`--only KEY=VALUE` are those of `lm.sweep`. Docs: docs/results/adatask.md.
"""

import argparse
import io
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import optim
from lm.config import ModelConfig
from lm.data import Loader, eval_batches
from lm.experiment import Experiment
from lm.files import atomic_write_bytes, atomic_write_text
from lm.sweep import Sweep, best
from lm.train.config import DataConfig, GuardConfig, OptimConfig, RunConfig
from lm.train.multitask import clip_tasks, with_tasks
from lm.train.optimizer import decay_mask

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
DOMAINS = {"python_code": 10, "c_code": 4, "english_shakespeare": 1, "chinese": 1}
"""Rows of a batch; the last two domains are the small ones."""
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS = (0, 1, 2)
LABELS = {
    "adamw": "AdamW",
    "adamw_equal": "AdamW, equal weights",
    "adatask": "AdaTask",
}
BETA1, BETA2, WEIGHT_DECAY, CLIP, DOMINANCE_DECAY = 0.9, 0.95, 0.1, 1.0, 0.99
START, END = "<!-- results -->", "<!-- end of results -->"


def config(mixture: Path, steps: int) -> RunConfig:
    """The run that all contenders share; clipping is the contender's."""
    return with_tasks(
        RunConfig(
            steps=steps,
            batch_size=sum(DOMAINS.values()),
            sequence_length=128,
            model=ModelConfig(
                vocab_size=320, num_layers=2, d_model=96, num_heads=3, d_ff=256, max_context=128,
                dtype="float32", unroll=2,
            ),
            data=DataConfig(source="mixture", path=str(mixture)),
            optim=OptimConfig(name="adatask", warmup_steps=steps // 10, clip=0.0),
            guard=GuardConfig(spike_sigma=0.0),
        )
    )  # fmt: skip


def mixture_file(data: Path | None, folder: Path) -> Path:
    """Write the mixture of the domains in `data` into `folder`."""
    if data is None:
        raise SystemExit(
            "give --data-dir, a folder with DOMAIN.train.parquet and DOMAIN.valid.parquet for "
            f"{', '.join(DOMAINS)}: the built-in corpus is one domain"
        )
    members = [
        {
            "source": "parquet",
            "name": name,
            "weight": rows,
            "path": str((data / f"{name}.train.parquet").resolve()),
            "valid_path": str((data / f"{name}.valid.parquet").resolve()),
        }
        for name, rows in DOMAINS.items()
    ]
    file = folder / "mixture.json"
    file.write_text(json.dumps(members))
    return file


def contender(name: str):
    """From the schedule to the optimizer, fed with the gradients of the domains' losses.

    With joint moments AdaTask is AdamW on the sum of the losses, each the share that its rows have
    in the batch; it also says which domain dominates. "adamw_equal" weights the domains' mean
    losses equally instead.
    """
    joint = name != "adatask"
    rows = np.array(list(DOMAINS.values()), np.float32)
    weights = rows.sum() / rows / len(rows) if name == "adamw_equal" else np.ones_like(rows)

    def weigh(grads, params=None):
        del params
        return jax.tree.map(lambda g: g * weights.reshape(-1, *[1] * (g.ndim - 1)), grads)

    return lambda schedule: optax.chain(
        optax.stateless(weigh),
        clip_tasks(CLIP, joint),
        optim.adatask(
            schedule,
            len(DOMAINS),
            b1=BETA1,
            b2=BETA2,
            weight_decay=WEIGHT_DECAY,
            mask=decay_mask,
            joint=joint,
            dominance_decay=DOMINANCE_DECAY,
        ),
    )


class Domains(Experiment):
    """Batches that tell the domains apart, and the held-out loss of each."""

    def __init__(self, config: RunConfig, eval_batches_each: int):
        super().__init__(config, eval_batch_count=1)
        size, length = config.batch_size, config.sequence_length
        self.names = [store.name for store, _ in self.stores["valid"]]
        self.each = [
            [batch for batch, _ in eval_batches(store, size, length, eval_batches_each)]
            for store, _ in self.stores["valid"]
        ]
        self.losses: dict[str, float] = {}

    def loader(self, seed: int) -> Loader:
        return Loader(
            self.stores["train"],
            batch_size=self.config.batch_size,
            sequence_length=self.config.sequence_length,
            seed=seed,
            sources=True,
        )

    def evaluate(self, params) -> float:
        """Mean over the domains of their held-out losses, which stay in `losses`."""
        for name, batches in zip(self.names, self.each, strict=True):
            self.held_out = batches
            self.losses[name] = super().evaluate(params)
        return statistics.fmean(self.losses.values())


def dominance_of_layers(state) -> dict[str, list[float]]:
    """Each domain's share in the updates of every matrix and vector of every layer."""
    relative = optim.task_dominance(state.opt_state).relative
    shares = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(relative):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        stacked = name.startswith("layers.")
        for layer in range(leaf.shape[1] if stacked else 1):
            part = np.asarray(leaf[:, layer] if stacked else leaf, np.float64)
            sums = part.reshape(len(part), -1).sum(1)
            where = f"{layer}.{name.removeprefix('layers.')}" if stacked else name
            shares[where.removesuffix(".kernel")] = (sums / max(sums.sum(), 1e-30)).tolist()
    return shares


def execute(experiment: Domains, run: Mapping[str, Any]) -> dict[str, Any]:
    """Train one contender and measure it."""
    curve = experiment.run(
        run["optimizer"],
        contender(run["optimizer"]),
        learning_rate=run["learning_rate"],
        seed=run["seed"],
        eval_every=max(experiment.config.steps // 6, 1),
    )
    number = lambda x: round(x, 4) if math.isfinite(x) else None  # noqa: E731
    return curve.as_row() | {
        "domains": {name: number(loss) for name, loss in experiment.losses.items()},
        "dominance": {
            name: [number(x) for x in shares]
            for name, shares in dominance_of_layers(curve.state).items()
        },
    }


def chosen(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """For each contender its runs at the learning rate with the lowest mean loss, by seed."""
    rates = best(rows, by="optimizer", value="final")
    found = {}
    for name in LABELS:
        if name in rates:
            mine = [
                r["run"] | {"result": r["result"]} for r in rows if r["run"]["optimizer"] == name
            ]
            mine = [r for r in mine if r["learning_rate"] == rates[name]]
            found[name] = sorted(mine, key=lambda r: r["seed"])
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and standard error; the latter needs two values."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def verdict(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The paired difference, and whether it is one (two standard errors and 0.1 %)."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(differences) < 2:
        return f"{differences[0]:+.3f}"
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    tie = abs(mean) < 2 * error or abs(mean) < 1e-3 * statistics.fmean(theirs)
    return f"{mean:+.3f} ± {error:.3f}" + (" (tie)" if tie else "")


def overall(run: Mapping[str, Any]) -> list[float]:
    """Each domain's dominance, the mean over matrices and vectors of all layers."""
    return np.mean(list(run["result"]["dominance"].values()), axis=0).tolist()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as markdown."""
    runs = chosen(rows)
    names = list(DOMAINS)
    head = ["", "peak rate", "seeds", *names, "mean of the domains", "mean of the rows"]
    total = sum(DOMAINS.values())
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]

    def losses(run):
        each = [run["result"]["domains"][name] for name in names]
        by_rows = sum(rows * x for rows, x in zip(DOMAINS.values(), each, strict=True)) / total
        return [*each, statistics.fmean(each), by_rows]

    for label, mine in runs.items():
        cells = [LABELS[label], f"{mine[0]['learning_rate']:g}", str(len(mine))]
        cells += [spread(values) for values in zip(*map(losses, mine), strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    for label in ("adamw", "adamw_equal"):
        if label in runs and "adatask" in runs:
            ours = {r["seed"]: r for r in runs["adatask"]}
            pairs = [(ours[r["seed"]], r) for r in runs[label] if r["seed"] in ours]
            sides = (zip(*map(losses, side), strict=True) for side in zip(*pairs, strict=True))
            cells = [verdict(a, b) for a, b in zip(*sides, strict=True)]
            lines.append(f"| AdaTask - {LABELS[label]} | | | {' | '.join(cells)} |")
    lines += ["", "Dominance (share of each domain in the average of squared updates):", ""]
    lines += ["| | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for label, mine in runs.items():
        shares = [spread(values) for values in zip(*map(overall, mine), strict=True)]
        lines.append(f"| {LABELS[label]} | {' | '.join(shares)} |")
    lines += ["", "Mean of the domains' held-out losses at every learning rate:", ""]
    for label in runs:
        mine = [row for row in rows if row["run"]["optimizer"] == label]
        rates = sorted({row["run"]["learning_rate"] for row in mine})
        finals = [
            [r["result"]["final"] for r in mine if r["run"]["learning_rate"] == rate]
            for rate in rates
        ]
        shown = (
            f"{rate:g}: {'diverged' if None in values else spread(values)}"
            for rate, values in zip(rates, finals, strict=True)
        )
        lines.append(f"- {LABELS[label]}: {'; '.join(shown)}")
    return "\n".join(lines)


def picture(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG: dominance in every layer before and after, and the mean loss over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = chosen(rows)
    figure = Figure(figsize=(11, 5), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(runs) + 1, width_ratios=[1] * len(runs) + [1.3])
    for axis, (label, mine) in zip(axes, runs.items(), strict=False):
        layers = list(mine[0]["result"]["dominance"])
        shares = np.mean([list(r["result"]["dominance"].values()) for r in mine], axis=0)
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(DOMAINS)), DOMAINS, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(len(layers)), layers if axis is axes[0] else [], fontsize=7)
        axis.set_title(LABELS[label], fontsize=9)
    figure.colorbar(image, ax=axes[: len(runs)], shrink=0.6, label="share in squared updates")
    for label, mine in runs.items():
        curves = np.array([run["result"]["valid"] for run in mine], float)
        axes[-1].plot(mine[0]["result"]["steps"], curves.mean(0), label=LABELS[label])
    axes[-1].set_xlabel("step")
    axes[-1].set_ylabel("held-out loss, mean of the domains")
    axes[-1].legend(frameon=False, fontsize=8, loc="upper right")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def report(rows: Sequence[Mapping[str, Any]], page: Path) -> None:
    """Put the tables into `page`, between its two marks, and the picture beside it."""
    if not rows:
        raise SystemExit("there are no finished runs yet")
    text = page.read_text() if page.exists() else f"{START}\n{END}\n"
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    devices = "; ".join(sorted({f"{row['device']}, {row['versions']}" for row in rows}))
    image = page.with_suffix(".png")
    body = (
        f"{table(rows)}\n\n![dominance and loss]({image.name})\n\n"
        f"{len(rows)} runs of {rows[0]['run']['steps']} steps on {devices}."
    )
    atomic_write_bytes(image, picture(rows))
    atomic_write_text(page, f"{before}{START}\n{body}\n{END}{after}")
    print(body)


def main(argv: Sequence[str] | None = None) -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--data-dir", type=Path)
    own.add_argument("--steps", type=int, default=250)
    own.add_argument("--results", type=Path, default=RESULTS / "adatask.jsonl")
    args, rest = own.parse_known_args(argv)
    runs = [
        {"optimizer": name, "learning_rate": rate, "seed": seed, "steps": args.steps}
        for seed in SEEDS
        for name in LABELS
        for rate in RATES
    ]
    experiment: list[Domains] = []

    def run(run):
        if not experiment:
            experiment.append(
                Domains(config(mixture_file(args.data_dir, Path(folder)), args.steps), 6)
            )
        return execute(experiment[0], run)

    def of_these_steps(rows):
        rows = [row for row in rows if row["run"]["steps"] == args.steps]
        report(rows, args.results.with_suffix(".md"))

    with tempfile.TemporaryDirectory() as folder:
        return Sweep(args.results, runs).main(rest, run, of_these_steps)


if __name__ == "__main__":
    raise SystemExit(main())
