"""The report of `scripts/reproduce_merging.py`: table, plot and results.json from its runs."""

import json

import numpy as np

from lm.files import atomic_write_json, atomic_write_text

SUMMARY = """
# Eight experts merged by every method

`python scripts/reproduce_merging.py --data-dir DATA`; one line for each run in
[runs.jsonl](runs.jsonl). Scores are shares of right predictions on held-out text, in per cent of
the experts' own; *unseen* is not normalized; *corrupted* has a tenth of the text's bytes replaced.
The setting of each method is the best of at most three on other held-out text. *MB*: peak of a
process that merges, above what it takes idle, the model being 2 MB. *stored*: size of the result in
models. ± is the standard error over seeds. Orange: methods that learn from text.

![Normalized scores, and unseen tasks against them](scores.png)
"""


TASKS = ("french", "german", "chinese", "c_code", "python_code")
TASKS += ("which_language", "which_code", "which_prose")
OTHERS = ("spanish", "shell_code")
PARTS = {"tune": TASKS, "test": TASKS, "corrupted": TASKS, "unseen": OTHERS}
"""What a result has scores for: of the half that chooses, of the one that measures, of corrupted
input, of tasks that nobody was trained for."""


def pack(result):
    """A result with rounded lists in place of scores by task: a third of the bytes."""
    short = {part: [round(result[part][task], 1) for task in PARTS[part]] for part in PARTS}
    return short | {key: result[key] for key in ("merge_seconds", "stored")}


def unpack(result):
    """The result that `pack` was given."""
    lists = {part: dict(zip(PARTS[part], result[part], strict=True)) for part in PARTS}
    return result | lists


def chosen(rows):
    """{method: {seed: the result whose setting is best on the half that chooses}}."""
    individual = {
        row["run"]["seed"]: row["result"] for row in rows if row["run"]["method"] == "individual"
    }
    found = {}
    for row in rows:
        method, seed, result = row["run"]["method"], row["run"]["seed"], row["result"]
        if seed not in individual:
            continue
        result = result | {
            part: {
                task: 100 * value / max(individual[seed][part][task], 1e-9)
                for task, value in result[part].items()
            }
            for part in ("tune", "test", "corrupted")
        }
        best = found.setdefault(method, {}).get(seed)
        if best is None or mean(result["tune"]) > mean(best["tune"]):
            found[method][seed] = result
    return found


def mean(values):
    return float(np.mean(list(values.values())))


def spread(values):
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{error}"


def report(rows, folder, learning):
    """Write README.md, results.json and scores.png; `learning`: methods that learn from text."""
    found = chosen([row | {"result": unpack(row["result"])} for row in rows])
    if not found:
        raise SystemExit("no run of `individual` is finished: nothing can be normalized")
    tasks = list(next(iter(found["individual"].values()))["test"])
    lines = [SUMMARY.strip(), "", "| method | average | " + " | ".join(tasks) + " | unseen |"]
    lines[-1] += " corrupted | seconds | MB | stored | seeds |"
    lines.append("|---" * (len(tasks) + 8) + "|")
    averages, table = {}, {}
    file = folder / "memory.json"
    memory = json.loads(file.read_text()) if file.is_file() else {}
    order = sorted(found, key=lambda m: -np.mean([mean(r["test"]) for r in found[m].values()]))
    for method in order:
        results = list(found[method].values())
        each = lambda part, results=results: [mean(r[part]) for r in results]  # noqa: E731
        averages[method] = round(float(np.mean(each("test"))), 2)
        table[method] = {task: np.mean([r["test"][task] for r in results]) for task in tasks}
        cells = [f"{table[method][task]:.1f}" for task in tasks]
        cost = [f"{np.mean([r[k] for r in results]):.1f}" for k in ("merge_seconds", "stored")]
        cost.insert(1, f"{memory[method]:.0f}" if method in memory else "-")
        row = [method, spread(each("test")), *cells, spread(each("unseen"))]
        lines.append("| " + " | ".join([*row, spread(each("corrupted")), *cost]))
        lines[-1] += f" | {len(results)} |"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"normalized_average": averages, "seeds": len(found["individual"])}
    atomic_write_json(folder / "results.json", content)
    atomic_write_text(folder / "README.md", "\n".join(lines) + "\n")
    plot(order, averages, found, folder, learning)
    print(f"wrote {folder / 'README.md'}")


def plot(order, averages, found, folder, learning):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, unseen) = plt.subplots(1, 2, figsize=(10, 5))
    names = order[::-1]
    colors = ["tab:orange" if name in learning else "tab:blue" for name in names]
    bars.barh(names, [averages[name] for name in names], color=colors)
    bars.set(xlabel="normalized score, %", xlim=(min(averages.values()) - 5, None))
    bars.tick_params(axis="y", labelsize=7)
    for name in names:
        y = np.mean([mean(r["unseen"]) for r in found[name].values()])
        unseen.scatter(averages[name], y, color=colors[names.index(name)], s=14)
        unseen.annotate(name, (averages[name], y), fontsize=6)
    unseen.set(xlabel="normalized score, %", ylabel="unseen tasks: right predictions, %")
    figure.tight_layout()
    figure.savefig(folder / "scores.png", dpi=80)
