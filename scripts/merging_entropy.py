"""Does the entropy of predictions tell how good a merged language model is?

    python scripts/merging_entropy.py --data-dir DATA

AdaMerging and WEMoE minimize entropy in place of a loss that needs labels: on image classifiers the
two fall together (arXiv 2310.02575, section 3.2). For the models of `scripts/reproduce_merging.py`
this prints, along lambda of task arithmetic (base + lambda * sum of task vectors) and for the
experts themselves, the mean entropy of predictions, the negative log-likelihood of what follows,
and the share of right predictions, for tasks of plain text and tasks of questions; and the rank
correlation of entropy and log-likelihood along lambda. Writes entropy.md and entropy.png beside
the other results.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
import reproduce_merging as bench_module

import lm
import lm.hf
from lm.files import atomic_write_text
from lm.merging.adaptive.benchmark import sample_of

LAMBDAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)


def measure(logits, sample, answers):
    """(mean entropy, mean negative log-likelihood, share right in per cent) in nats."""
    ids = np.asarray([ord(a) for a in answers]) if answers else np.arange(256)
    found = np.asarray(logits(sample.tokens), np.float32)[..., ids]
    targets = (sample.targets[..., None] == ids).argmax(-1)
    log_p = np.asarray(jax.nn.log_softmax(found, axis=-1))
    own = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    weights = sample.weights / sample.weights.sum()
    entropy = -(np.exp(log_p) * log_p).sum(-1)
    return np.asarray(
        [
            (weights * entropy).sum(),
            -(weights * own).sum(),
            100 * (weights * (found.argmax(-1) == targets)).sum(),
        ]
    )


def curves(bench, seed):
    """[lambda, kind, (entropy, nats, right)] of merged models, and [kind, 3] of the experts."""
    folder = bench.prepared(seed)
    base = lm.hf.load(folder / "base", "float32")[1]
    experts = [lm.hf.load(folder / spec.name, "float32")[1] for spec in bench.tasks]
    total = jax.tree.map(lambda b, *xs: sum(x - b for x in xs), base, *experts)
    samples = [
        sample_of(spec, bench.domains, "test", 32 * (4 if spec.answers else 1), bench.length, seed)
        for spec in bench.tasks
    ]
    apply = jax.jit(lambda params, tokens: lm.apply(bench.config, params, tokens))

    def kinds(models):
        found = [
            measure(lambda tokens, params=params: apply(params, tokens), sample, spec.answers)
            for params, sample, spec in zip(models, samples, bench.tasks, strict=True)
        ]
        asks = np.asarray([bool(spec.answers) for spec in bench.tasks])
        return np.stack([np.mean(np.asarray(found)[asks == kind], 0) for kind in (False, True)])

    merged = [
        kinds([jax.tree.map(lambda b, t, x=x: b + x * t, base, total)] * len(samples))
        for x in LAMBDAS
    ]
    return np.stack(merged), kinds(experts)


def ranks(values):
    return np.argsort(np.argsort(values))


def report(merged, experts, out: Path):
    """`merged` [seed, lambda, kind, 3], `experts` [seed, kind, 3]."""
    names = ("plain text", "questions")
    lines = [
        __doc__.split("\n\n")[0],
        "",
        "    python scripts/merging_entropy.py --data-dir DATA",
        "",
    ]
    lines[0] = f"# {lines[0]}"
    lines += ["| lambda | " + " | ".join(f"{n}: {w}" for n in names for w in COLUMNS) + " |"]
    lines += ["|---" * 7 + "|"]
    for i, x in enumerate([*LAMBDAS, "experts"]):
        values = experts if x == "experts" else merged[:, i]
        cells = [f"{v:.3f}" if j % 3 < 2 else f"{v:.1f}" for j, v in enumerate(values.mean(0).flat)]
        lines.append(f"| {x} | " + " | ".join(cells) + " |")
    lines.append("")
    for kind, name in enumerate(names):
        each = [np.corrcoef(ranks(one[:, kind, 0]), ranks(one[:, kind, 1]))[0, 1] for one in merged]
        lines.append(
            f"Rank correlation of entropy and log-likelihood along lambda, {name}: "
            + ", ".join(f"{r:.2f}" for r in each)
            + " (one number for each seed; 1 would make entropy a good stand-in)."
        )
    atomic_write_text(out / "entropy.md", "\n".join([*lines, "", "![](entropy.png)"]) + "\n")
    print("\n".join(lines))

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for kind, (name, axis) in enumerate(zip(names, axes, strict=True)):
        for column, label in enumerate(COLUMNS[:2]):
            axis.plot(LAMBDAS, merged[:, :, kind, column].mean(0), marker="o", label=label)
        axis.set(title=name, xlabel="lambda of task arithmetic", ylabel="nats")
        axis.legend()
    figure.tight_layout()
    figure.savefig(out / "entropy.png", dpi=80)


COLUMNS = ("entropy", "log-likelihood lost", "right, %")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir")
    parser.add_argument("--work", default=bench_module.WORK)
    parser.add_argument("--out", type=Path, default=bench_module.RESULTS)
    args = parser.parse_args()
    args.smoke = False
    bench = bench_module.Benchmark(args)
    found = [curves(bench, seed) for seed in bench_module.SEEDS]
    args.out.mkdir(parents=True, exist_ok=True)
    report(*(np.stack(part) for part in zip(*found, strict=True)), args.out)


if __name__ == "__main__":
    sys.exit(main())
