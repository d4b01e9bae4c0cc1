"""Merging eight experts of one small language model by every method, static and adaptive.

    python scripts/reproduce_merging.py --data-dir DATA     # all missing runs, one after the other
    python scripts/reproduce_merging.py --list              # what is missing
    python scripts/reproduce_merging.py --limit 5 --only seed=0
    python scripts/reproduce_merging.py --data-dir DATA --memory   # of one merge by each method
    python scripts/reproduce_merging.py --report            # docs/results/merging/: table, plots

For each seed a byte-level model is pre-trained on all domains, eight experts are fine-tuned from it
(five continue a language or a programming language, three answer a question about a text by one
letter; two more languages are left as unseen tasks), and merged. Every method gets three settings
(lambda, density or learning rate; methods without any: one); the setting is chosen by the scores on
one half of the held-out text, the other half measures. Methods that learn see the first half
without labels. Scores are shares of right predictions, normalized by those of the experts.
--data-dir holds NAME.train.parquet and NAME.valid.parquet with a column `text`; without it the
domains are packages of Python's own library. `--smoke` is a run of seconds with a tiny model.
"""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import merging_report
import numpy as np

import lm
import lm.hf
from lm.devices import memory_in_use
from lm.files import atomic_write_json
from lm.merging.adaptive.benchmark import (
    TaskSpec,
    corrupted,
    fit,
    read_domains,
    sample_of,
    score,
)
from lm.sweep import Sweep

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "merging"
WORK = str(Path(tempfile.gettempdir()) / "aniso-merging")
SEEDS = (0, 1, 2)
LANGUAGES = ("french", "german", "spanish", "chinese", "japanese")
CODE = ("c_code", "python_code", "shell_code")
PROSE = ("english_wiki", "english_tech", "english_shakespeare")
NAMES = ("french", "german", "chinese", "c_code", "python_code", "spanish", "shell_code")
"""Domains by their part: five to continue, two unseen; others only in the questions."""


def grid(name, *values, **fixed):
    """Settings of one parameter, three at most."""
    return [fixed | {name: value} for value in values]


STATIC = {
    "linear": [{}],
    "task_arithmetic": grid("lambda", 0.1, 0.2, 0.4),
    "ties": grid("lambda", 0.5, 1.0, 1.5, density=0.2),
    "dare_linear": grid("lambda", 0.1, 0.2, 0.4, density=0.5),
    "della_linear": grid("lambda", 0.1, 0.2, 0.4, density=0.5),
    "breadcrumbs": grid("lambda", 0.1, 0.2, 0.4, density=0.9),
    "magmax": grid("lambda", 0.3, 0.6, 1.0),
    "sce": grid("select_topk", 0.1, 0.5, 1.0),
    "ram": [{}],
    "multislerp": [{}],
    "karcher": [{}],
    "model_stock": [{}],
    "pcb": grid("lambda", 0.6, 1.0, 1.4, ratio=0.1),
    "consensus": grid("lambda", 0.1, 0.2, 0.4),
    "tsv": grid("lambda", 0.5, 1.0, 1.5),
    "iso_c": grid("lambda", 0.5, 1.0, 1.5),
    "iso_cts": grid("lambda", 0.5, 1.0, 1.5),
    "knots": grid("lambda", 0.5, 1.0, 1.5, density=0.5),
    "wudi": grid("lambda", 0.5, 1.0, 1.5),
}
NO_WEIGHT = ("magmax", "sce", "ram", "karcher", "model_stock", "pcb", "consensus", "tsv")
NO_WEIGHT += ("iso_c", "iso_cts", "wudi")
NO_BASE = ("linear", "karcher", "multislerp")
TEXT = {"examples": 128, "sequence_length": 64}
STEPS = TEXT | {"steps": 100, "batch_size": 4, "weight": 0.2}
ADAPTIVE = {
    "fisher": grid("floor", 1e-6, 1e-4, 1e-2, **TEXT),
    "regmean": grid("alpha", 0.7, 0.9, 1.0, **TEXT),
    "regmean++": grid("alpha", 0.7, 0.9, 1.0, **TEXT),
    "adamerging, task-wise": grid("learning_rate", 1e-3, 3e-3, 1e-2, **STEPS, layer_wise=False),
    "adamerging": grid("learning_rate", 1e-3, 3e-3, 1e-2, **STEPS),
    "adamerging++, task-wise": grid("learning_rate", 1e-3, 3e-3, 1e-2, **STEPS, layer_wise=False),
    "adamerging++": grid("learning_rate", 1e-3, 3e-3, 1e-2, **STEPS),
    "surgery": grid("learning_rate", 1e-3, 3e-3, 1e-2, **STEPS | {"batch_size": 8}),
    "surgery_v2": grid("learning_rate", 1e-3, 3e-3, 1e-2, **STEPS | {"batch_size": 8}),
    "wemoe": grid("learning_rate", 3e-4, 1e-3, 3e-3, **STEPS),
    "e_wemoe": grid("learning_rate", 3e-4, 1e-3, 3e-3, **STEPS),
    "adamerging, diversity": grid("learning_rate", 1e-3, 3e-3, 1e-2, **STEPS, diversity=1.0),
    "e_wemoe, diversity": grid("learning_rate", 3e-4, 1e-3, 3e-3, **STEPS, diversity=1.0),
}
LEARNT = tuple(name for name in ADAPTIVE if name not in ("fisher", "regmean", "regmean++"))


def runs():
    found = []
    for seed in SEEDS:
        for method in ("pretrained", "individual", *STATIC, *ADAPTIVE):
            settings = STATIC.get(method) or ADAPTIVE.get(method) or [{}]
            found += [dict(method=method, setting=n, seed=seed) for n in range(len(settings))]
    return found


class Benchmark:
    """Models and text of a place."""

    def __init__(self, args):
        self.smoke, self.domains = args.smoke, read_domains(args.data_dir)
        self.few = self.smoke
        kind = "smoke" if args.smoke else "full"
        source = Path(args.data_dir).name if args.data_dir else "library"
        self.work = Path(args.work) / f"{kind}-{source}"
        known = set(LANGUAGES + CODE + PROSE) <= set(self.domains)
        names = list(self.domains)
        alias = dict(zip(LANGUAGES + CODE + PROSE, names, strict=False)) if not known else {}
        place = lambda each: tuple(alias.get(name, name) for name in each)  # noqa: E731
        language = [TaskSpec(name, place([name])) for name in NAMES]
        self.unseen = language[5:]
        self.tasks = [
            *language[:4],
            TaskSpec("python_code", place(["python_code"]), 450),
            TaskSpec("which_language", place(["french", "german", "spanish", "english_tech"]), 450),
            TaskSpec("which_code", place(CODE), 300),
            TaskSpec("which_prose", place(PROSE), 300),
        ]
        small = dict(num_layers=2, d_model=32, num_heads=2, d_ff=64)
        full = dict(num_layers=4, d_model=96, num_heads=4, d_ff=256)
        self.config = lm.ModelConfig(
            vocab_size=260,
            max_context=128,
            dtype="float32",
            **(small if self.smoke else full),
        )
        self.batch, self.length = (4, 48) if self.smoke else (16, 64)

    def steps(self, count):
        return 2 if self.smoke else count

    @functools.cache  # noqa: B019  one object a process
    def prepared(self, seed):
        """The folder of a seed: base, experts and text without labels, made once."""
        folder = self.work / f"seed-{seed}"
        if not folder.is_dir():
            building = folder.with_suffix(".building")
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            self._make(building, seed)
            os.rename(building, folder)
        return folder

    def _make(self, folder, seed):
        everything = [TaskSpec(name, (name,)) for name in self.domains]
        sample = lambda spec, step: sample_of(  # noqa: E731
            spec, self.domains, "train", self.batch, self.length, 10_000 * seed + step
        )
        params = fit(
            self.config,
            lm.init(self.config, jax.random.key(seed)),
            lambda step: sample(everything[step % len(everything)], step),
            steps=self.steps(1500),
            rate=3e-3,
        )
        lm.hf.save(folder / "base", self.config, params, "byte")
        for spec in self.tasks:
            expert = fit(
                self.config,
                params,
                functools.partial(sample, spec),
                steps=self.steps(spec.steps),
                rate=1e-3,
            )
            lm.hf.save(folder / spec.name, self.config, expert, "byte")
            self._text(folder, spec, seed)

    def _text(self, folder, spec, seed):
        """Text of the task from the half that chooses, without labels."""
        rows = sample_of(spec, self.domains, "tune", 128, 64, 99 + seed)
        with (folder / f"{spec.name}.jsonl").open("w") as file:
            for tokens, weights in zip(rows.tokens, rows.weights, strict=True):
                last = int(np.flatnonzero(weights)[-1]) + 1
                text = bytes(tokens[:last].astype(np.uint8)).decode("utf-8", errors="replace")
                file.write(json.dumps({"text": text}) + "\n")

    def execute(self, run):
        method, seed = run["method"], run["seed"]
        folder = self.prepared(seed)
        out = self.work / f"out-{os.getpid()}"
        shutil.rmtree(out, ignore_errors=True)
        began = time.monotonic()
        if method in ("pretrained", "individual"):
            made = {"pretrained": "base"}.get(method)
            logits = {
                spec.name: dense(self.config, folder / (made or spec.name)) for spec in self.tasks
            }
            logits[None] = dense(self.config, folder / "base")
            stored = folder / "base"
        else:
            self._merge(method, run["setting"], folder, out, seed)
            logits, stored = self._loaded(out), out
        seconds = time.monotonic() - began
        result = self._scores(logits, seed)
        size = lambda path: sum(f.stat().st_size for f in path.rglob("*") if f.is_file())  # noqa: E731
        result |= {
            "merge_seconds": round(seconds, 2),
            "stored": round(size(stored) / size(folder / "base"), 2),
        }
        shutil.rmtree(out, ignore_errors=True)
        return merging_report.pack(result)

    def memory(self, method):
        """MB that this process takes for a merge above what it took before; few steps."""
        folder, out = self.prepared(SEEDS[0]), self.work / f"out-{os.getpid()}"
        jax.block_until_ready(jax.numpy.zeros(1))
        before, self.few = memory_in_use(jax.local_devices()), True
        self._merge(method, 0, folder, out, SEEDS[0])
        shutil.rmtree(out, ignore_errors=True)
        return (memory_in_use(jax.local_devices()) - before) / 1e6

    def _merge(self, method, setting, folder, out, seed):
        from lm.merging.adaptive.config import parse_adaptive
        from lm.merging.adaptive.session import AdaptiveSession
        from lm.merging.config import parse_config
        from lm.merging.session import Session

        value = {"merge_method": method.split(",")[0], "parameters": settings_of(method)[setting]}
        models = [{"model": str(folder / spec.name)} for spec in self.tasks]
        if method in STATIC:
            each = {} if method in NO_WEIGHT else {"weight": 1.0}
            density = value["parameters"].get("density")
            each |= {"density": density} if density else {}
            whole = {k: v for k, v in value["parameters"].items() if k != "density"}
            value |= {"models": [m | {"parameters": each} for m in models], "parameters": whole}
            if method not in NO_BASE:
                value["base_model"] = str(folder / "base")
            Session(parse_config(value), out, say=lambda _: None).run()
            return
        if self.few and "steps" in value["parameters"]:
            value["parameters"] = value["parameters"] | {"steps": 2, "examples": 8}
        for entry, spec in zip(models, self.tasks, strict=True):
            data = {"path": str(folder / f"{spec.name}.jsonl")}
            entry["data"] = data | ({"answers": list(spec.answers)} if spec.answers else {})
        value["models"] = models
        if method in LEARNT:
            value["base_model"] = str(folder / "base")
        AdaptiveSession(parse_adaptive(value), out, seed=seed, say=lambda _: None).run()

    def _loaded(self, out):
        from lm.merging.adaptive.load import load

        merged = load(out)
        of = lambda task: lambda tokens: merged.logits(tokens, task)  # noqa: E731
        known = {task: of(task) for task in merged.tasks if merged.corrections}
        return {spec.name: known.get(spec.name, of(None)) for spec in self.tasks} | {None: of(None)}

    def _scores(self, logits, seed):
        count = 8 if self.smoke else 64
        result = {}
        for part in ("tune", "test"):
            for spec in self.tasks:
                many = count * (4 if spec.answers else 1)
                sample = sample_of(spec, self.domains, part, many, self.length, seed)
                own = logits[spec.name]
                right = score(own, sample, spec.answers)[0]
                result.setdefault(part, {})[spec.name] = round(right, 3)
                if part == "test":
                    broken = corrupted(sample, 0.1, seed)
                    right = score(own, broken, spec.answers)[0]
                    result.setdefault("corrupted", {})[spec.name] = round(right, 3)
        for spec in self.unseen:
            sample = sample_of(spec, self.domains, "test", count, self.length, seed)
            result.setdefault("unseen", {})[spec.name] = round(score(logits[None], sample)[0], 3)
        return result


def settings_of(method):
    return STATIC.get(method) or ADAPTIVE.get(method) or [{}]


def dense(config, folder):
    params = lm.hf.load(folder, "float32")[1]
    return lambda tokens: dense_logits(config, params, tokens)


@functools.partial(jax.jit, static_argnames=("config",))
def dense_logits(config, params, tokens):
    return lm.apply(config, params, tokens)


def measure_memory(out, words):
    """Write memory.json: one merge of every method, each in a process of its own."""
    words, found = [word for word in words if word != "--memory"], {}
    for method in (*STATIC, *ADAPTIVE):
        command = [sys.executable, __file__, *words, "--memory", method]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[method] = round(float(run.stdout.splitlines()[-1]), 1)
        print(method, found[method], flush=True)
    atomic_write_json(out / "memory.json", found)


def main(argv=None):
    own = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    own.add_argument("--data-dir")
    own.add_argument("--work", default=WORK)
    own.add_argument("--out", default=str(RESULTS))
    own.add_argument("--smoke", action="store_true")
    own.add_argument("--memory", nargs="?", const="all", metavar="METHOD")
    args, rest = own.parse_known_args(argv)
    out = Path(args.out)
    if args.smoke and out == RESULTS:
        out = Path(args.work) / "smoke-results"
    if args.memory == "all":
        return measure_memory(out, argv or sys.argv[1:])
    if args.memory:
        return print(Benchmark(args).memory(args.memory))
    bench = functools.cache(lambda: Benchmark(args))
    sweep = Sweep(out / "runs.jsonl", runs())
    return sweep.main(
        rest,
        lambda run: bench().execute(run),
        lambda rows: merging_report.report(rows, out, ADAPTIVE),
    )


if __name__ == "__main__":
    sys.exit(main())
