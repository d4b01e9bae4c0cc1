"""Forgetting under head-wise MH-MoE, LoRAMoE, LoRA, EWC, O-LoRA and Microsoft's MH-MoE.

    python scripts/reproduce_mh_moe.py --data-dir DIR             # the missing runs, then
    python scripts/reproduce_mh_moe.py --data-dir DIR --report    # docs/results/mh_moe.md and .png

A byte-level decoder is pre-trained on the domains of `BASE` and kept; then adapters learn the
domains of `STREAM` one after the other, in an order of the seed. DIR holds DOMAIN.train.parquet and
DOMAIN.valid.parquet with a column `text`; without it the domains are packages of Python's standard
library. The first seed tries every learning rate, the others have each method's best.
`--list`, `--limit N` and `--only KEY=VALUE` are those of `lm.sweep`. Docs: docs/results/mh_moe.md.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import math
import os
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm import model
from lm.config import AdapterConfig, ModelConfig
from lm.continual import Domain, Method, Stream
from lm.continual_routes import route_report
from lm.data import open_stores
from lm.experiment import Experiment
from lm.files import atomic_write_bytes, atomic_write_text
from lm.layers import adapters
from lm.sweep import Sweep, best
from lm.train.config import DataConfig, GuardConfig, OptimConfig, RunConfig

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
BASE = ("english_wiki", "english_tech", "spanish", "japanese")
STREAM = ("french", "python_code", "chinese", "german", "c_code", "shell_code")
BUILT_IN_BASE = ("*.py",)
BUILT_IN_STREAM = ("asyncio", "email", "encodings", "tkinter", "unittest", "xml")
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
HELD_OUT_SHARE = 0.2
"""Of the files of Python's standard library."""
HELD_OUT = 6
"""Batches of each domain that are evaluated."""
LORA = AdapterConfig(kind="lora", rank=8)
METHODS = {
    "lora": Method(LORA),
    "ewc": Method(LORA, "ewc", 400.0),
    "olora": Method(LORA, "olora", 0.5),
    "loramoe": Method(AdapterConfig(kind="loramoe", rank=8)),
    "head_wise_2": Method(AdapterConfig(kind="head_wise", rank=8, heads=2)),
    "head_wise_4": Method(AdapterConfig(kind="head_wise", rank=8, heads=4)),
    "head_wise_8": Method(AdapterConfig(kind="head_wise", rank=8, heads=8)),
    "loramoe_26_5": Method(AdapterConfig(kind="loramoe", rank=8, experts=26, top_k=5)),
    "multi_head": Method(AdapterConfig(kind="multi_head", rank=8, heads=4)),
}
LABELS = {
    "lora": "LoRA, in sequence",
    "ewc": "LoRA with EWC",
    "olora": "O-LoRA",
    "loramoe": "LoRAMoE, 4 experts, top-1",
    "head_wise_2": "head-wise, 2 heads",
    "head_wise_4": "head-wise, 4 heads",
    "head_wise_8": "head-wise, 8 heads (4^8 routes)",
    "loramoe_26_5": "LoRAMoE, 26 experts, top-5 (C(26,5) routes)",
    "multi_head": "Microsoft's, as an adapter, 4 heads",
}
START, END = "<!-- results -->", "<!-- end of results -->"
MODEL = ModelConfig(
    vocab_size=320, num_layers=3, d_model=128, num_heads=4, d_ff=384, max_context=128,
    dtype="float32", unroll=3,
)  # fmt: skip


def domain_config(steps: int) -> RunConfig:
    """The run of each domain (arXiv 2602.12587's optimizer; rates are the sweep's)."""
    optimizer = OptimConfig(weight_decay=0.01, eps=1e-6, warmup_steps=max(steps // 10, 1))
    return RunConfig(steps=steps, batch_size=8, sequence_length=128, model=MODEL, optim=optimizer)


def base_config(data: DataConfig, steps: int) -> RunConfig:
    """The run of the base model."""
    return RunConfig(
        steps=steps,
        batch_size=16,
        sequence_length=128,
        model=MODEL,
        data=data,
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=steps // 10),
        guard=GuardConfig(spike_sigma=0.0),
    )


def data_of(folder: Path | None, name: str) -> DataConfig:
    """Where a domain's text is."""
    if folder is None:
        root = Path(sysconfig.get_path("stdlib"))
        path = root / name if name in BUILT_IN_BASE else root / name / "**" / "*.py"
        return DataConfig(source="text", path=str(path), valid_fraction=HELD_OUT_SHARE)
    files = [folder / f"{name}.{split}.parquet" for split in ("train", "valid")]
    for file in files:
        if not file.exists():
            raise SystemExit(f"--data-dir {folder} has no {file.name}")
    return DataConfig(source="parquet", path=str(files[0]), valid_path=str(files[1]))


def mixture(folder: Path | None, names: Sequence[str], place: Path) -> DataConfig:
    """The base model's text: equal shares of some domains."""
    members = []
    for name in names:
        config = data_of(folder, name)
        fields = ("source", "path", "valid_path")
        member = {field: getattr(config, field) for field in fields if getattr(config, field)}
        members.append(member | {"name": name.replace("*", "all"), "weight": 1})
    file = place / "mixture.json"
    file.write_text(json.dumps(members))
    return DataConfig(source="mixture", path=str(file), valid_fraction=HELD_OUT_SHARE)


def pretrained(config: RunConfig, identity: Any) -> model.Params:
    """The base model: trained once and kept in $ANISO_CACHE (or ~/.cache/aniso)."""
    told = json.dumps([identity, config.steps, str(MODEL)])
    cache = Path(os.environ.get("ANISO_CACHE") or "~/.cache/aniso").expanduser()
    file = cache / f"continual-{hashlib.sha256(told.encode()).hexdigest()[:16]}.npz"
    abstract = model.abstract_params(config.model)
    paths, structure = jax.tree.flatten_with_path(abstract)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    if not file.exists():
        experiment = Experiment(config, eval_batch_count=8)
        rate = config.optim.learning_rate
        curve = experiment.run("base", learning_rate=rate, seed=0, eval_every=config.steps)
        print(f"base model: {curve.final:.4f} nats a token in {curve.seconds:.0f} s -> {file}")
        out = io.BytesIO()
        np.savez(
            out,
            **dict(zip(names, map(np.asarray, jax.tree.leaves(curve.state.params)), strict=True)),
        )
        cache.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(file, out.getvalue())
    with np.load(file) as arrays:
        return jax.tree.unflatten(structure, [jax.numpy.asarray(arrays[name]) for name in names])


def make_stream(folder: Path | None, steps: int, base_steps: int, place: Path) -> Stream:
    base, stream = (BUILT_IN_BASE, BUILT_IN_STREAM) if folder is None else (BASE, STREAM)
    params = pretrained(
        base_config(mixture(folder, base, place), base_steps), [str(folder and folder.name), base]
    )
    domains = []
    for name in stream:
        stores = open_stores(data_of(folder, name))
        domains.append(Domain(name, stores["train"], stores["valid"]))
    return Stream(domain_config(steps), params, domains, HELD_OUT)


def order_of(seed: int, count: int) -> list[int]:
    """The order in which a seed learns the domains."""
    return np.random.default_rng(seed).permutation(count).tolist()


def execute(stream: Stream, run: Mapping[str, Any]) -> dict[str, Any]:
    """Learn the stream by one method and measure it."""
    method = METHODS[run["method"]]
    config = dataclasses.replace(MODEL, adapter=method.adapter)
    order = order_of(run["seed"], len(stream.domains))
    learned = stream.learn(method, order, rate=run["learning_rate"], seed=run["seed"])
    number = lambda x: round(float(x), 4) if math.isfinite(x) else None  # noqa: E731
    result = {
        "op": number(learned.op),
        "forgetting": number(learned.forgetting),
        "order": [stream.domains[i].name for i in order],
        "losses": [[number(x) for x in row] for row in learned.losses],
        "active": MODEL.num_layers * adapters.layer_size(config).active,
        "total": MODEL.num_layers * adapters.layer_size(config).total,
    }
    if method.adapter.kind != "lora":
        old = [stream.held_out[i] for i in order[: len(order) // 2]]
        result["routes"] = route_report(config, learned.halfway, learned.params, old)
    return result


def chosen(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Each method's runs, by seed, at the rate with which its first seed ended best."""
    rates = best([r for r in rows if r["run"]["seed"] == SEEDS[0]], by="method", value="op")
    found = {}
    for name in METHODS:
        mine = [
            row["run"] | row["result"]
            for row in rows
            if row["run"]["method"] == name and row["run"]["learning_rate"] == rates.get(name)
        ]
        if mine:
            found[name] = sorted(mine, key=lambda run: run["seed"])
    return found


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard error of what there is."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if len(known) < 2:
        return f"{known[0]:.3f}"
    return f"{np.mean(known):.3f} ± {np.std(known, ddof=1) / math.sqrt(len(known)):.3f}"


def paired(ours: Sequence[Mapping], theirs: Sequence[Mapping], value: str) -> str:
    """The difference on the seeds that both have; below two standard errors it is a tie."""
    other = {run["seed"]: run[value] for run in theirs}
    gaps = [run[value] - other[run["seed"]] for run in ours if run["seed"] in other]
    if len(gaps) < 2:
        return spread(gaps)
    tie = abs(np.mean(gaps)) < 2 * np.std(gaps, ddof=1) / math.sqrt(len(gaps))
    return spread(gaps) + (" (tie)" if tie else "")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as markdown."""
    runs = chosen(rows)
    reference = runs.get("loramoe", [])
    base = np.mean([run["forgetting"] for run in reference]) if reference else math.nan
    quality, routing = [], []
    for name, mine in runs.items():
        first, forgetting = mine[0], [run["forgetting"] for run in mine]
        quality.append(
            [LABELS[name], f"{first['learning_rate']:g}", str(len(mine))]
            + [f"{first['active']:,}", f"{first['total']:,}"]
            + [spread([run["op"] for run in mine]), paired(mine, reference, "op")]
            + [spread(forgetting), paired(mine, reference, "forgetting")]
            + [f"{np.mean(forgetting) / base:.2f}"]
        )
        if "routes" in first:
            measured = ("routes", "n_eff", "n_eff_shuffled", "coverage", "correlation")
            cells = [spread([run["routes"][key] for run in mine]) for key in measured]
            routing.append([LABELS[name], *cells])
    head = ["", "peak rate", "seeds", "active parameters", "all parameters", "OP"]
    head += ["OP - LoRAMoE's", "forgetting", "forgetting - LoRAMoE's", "ratio of forgetting"]
    lines = [
        *markdown(head, quality),
        "",
        "Routes of held-out tokens after half of the stream:",
        "",
    ]
    head = ["", "routes", "N_eff", "N_eff, labels shuffled", "tokens covered", "rank correlation"]
    lines += [*markdown(head, routing), "", "OP / forgetting at every rate, first seed:", ""]
    for name in runs:
        mine = [r for r in rows if r["run"]["method"] == name and r["run"]["seed"] == SEEDS[0]]
        mine = sorted(mine, key=lambda row: row["run"]["learning_rate"])
        shown = (
            f"{r['run']['learning_rate']:g}: {r['result']['op']} / {r['result']['forgetting']}"
            for r in mine
        )
        lines.append(f"- {LABELS[name]}: {'; '.join(shown)}")
    return "\n".join(lines)


def picture(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG: final quality against forgetting, and the loss of what was learned over the stream."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, mine in chosen(rows).items():
        points = [(run["forgetting"], run["op"]) for run in mine]
        left.scatter(*zip(*points, strict=True), label=LABELS[name], s=24)
        losses = np.array([run["losses"] for run in mine], float).mean(0)
        count = losses.shape[1]
        seen = [losses[t, :t].mean() for t in range(1, count + 1)]
        right.plot(range(1, count + 1), seen, label=LABELS[name])
    left.set_xlabel("forgetting, bits per byte")
    left.set_ylabel("OP, bits per byte")
    right.set_xlabel("domains learned")
    right.set_ylabel("held-out bits per byte, mean of the domains learned")
    right.legend(frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def report(rows: Sequence[Mapping[str, Any]], page: Path) -> None:
    """Put the tables into `page`, between its two marks, and the picture beside it."""
    if not rows:
        raise SystemExit("there are no finished runs yet")
    text = page.read_text() if page.exists() else f"{START}\n{END}\n"
    before, _, rest = text.partition(START)
    devices = "; ".join(sorted({f"{row['device']}, {row['versions']}" for row in rows}))
    image = page.with_suffix(".png")
    body = (
        f"{tables(rows)}\n\n![forgetting and quality]({image.name})\n\n"
        f"{len(rows)} runs, {rows[0]['run']['steps']} steps a domain, on {devices}."
    )
    atomic_write_bytes(image, picture(rows))
    atomic_write_text(page, f"{before}{START}\n{body}\n{END}{rest.partition(END)[2]}")
    print(body)


def planned(results: Path, data: str, steps: int, rates: Sequence[float]) -> list[dict[str, Any]]:
    """Every rate with the first seed; with the others each method's best, once it is known."""
    common = {"data": data, "steps": steps}

    def runs(method, rates, seed):
        return [{"method": method, "learning_rate": rate, "seed": seed} | common for rate in rates]

    plan = [run for method in METHODS for run in runs(method, rates, SEEDS[0])]
    done = Sweep(results, plan)
    missing = {run["method"] for run in done.missing()}
    rows = [row for row in done.rows() if row["run"] in plan]
    chosen = best(rows, by="method", value="op")
    for seed in SEEDS[1:]:
        for method in METHODS:
            if method not in missing:
                plan += runs(method, [chosen[method]], seed)
    return plan


def main(argv: Sequence[str] | None = None) -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--data-dir", type=Path)
    own.add_argument("--steps", type=int, default=60, help="on each domain")
    own.add_argument("--base-steps", type=int, default=800)
    own.add_argument("--rates", type=float, nargs="+", default=RATES)
    own.add_argument("--results", type=Path, default=RESULTS / "mh_moe.jsonl")
    args, rest = own.parse_known_args(argv)
    data = "stdlib" if args.data_dir is None else args.data_dir.resolve().name
    streams: list[Stream] = []

    def run(run):
        if not streams:
            with tempfile.TemporaryDirectory() as place:
                streams.append(make_stream(args.data_dir, args.steps, args.base_steps, Path(place)))
        return execute(streams[0], run)

    def write(rows):
        same = {"data": data, "steps": args.steps}
        rows = [row for row in rows if same.items() <= row["run"].items()]
        report(rows, args.results.with_suffix(".md"))

    def sweep() -> int:
        plan = planned(args.results, data, args.steps, args.rates)
        return Sweep(args.results, plan).main(rest, run, write)

    code = sweep()
    # The first seed's runs decide which runs the others have.
    return sweep() if {"--list", "--report", "--limit"}.isdisjoint(rest) else code


if __name__ == "__main__":
    raise SystemExit(main())
