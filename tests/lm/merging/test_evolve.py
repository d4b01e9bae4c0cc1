"""Searching merge coefficients against a command."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("cmaes")

from lm.merging.evolve import Search, evolve, read_score  # noqa: E402
from lm.merging.evolve_template import load_template  # noqa: E402
from lm.merging.types import MergeError  # noqa: E402

# Reads the two numbers of the merged model without NumPy: it is started for every candidate.
EVALUATE = """
import json, os, struct, sys
with open(sys.argv[1] + "/calls", "a") as file:
    file.write("x")
data = open(sys.argv[2] + "/model.safetensors", "rb").read()
x, y = struct.unpack("<2f", data[-8:])
if x < float(sys.argv[3]):
    sys.exit("x is too small")
print("some words")
print(json.dumps({"score": -((x - 0.3) ** 2) - (y - 0.8) ** 2}))
"""


def silent(_):
    pass


@pytest.fixture
def search(tmp_path, tools):
    """`search(budget, ...)`: two models at (1, 0) and (0, 1), merged to (w1, w2); best (.3, .8)."""
    for name, values in (("base", [0, 0]), ("a", [1, 0]), ("b", [0, 1])):
        tools.write_model(tmp_path / name, {"w": np.array(values, np.float32)}, config=None)
    (tmp_path / "evaluate.py").write_text(EVALUATE)

    def run(budget, out="out", least=-9.0, say=silent, template=None, **changes):
        path = tmp_path / "template.yml"
        weight = {"search": [0, 1]}
        value = template or {
            "merge_method": "task_arithmetic",
            "base_model": str(tmp_path / "base"),
            "models": [
                {"model": str(tmp_path / "a"), "parameters": {"weight": weight}},
                {"model": str(tmp_path / "b"), "parameters": {"weight": weight}},
            ],
            "dtype": "float32",
        }
        path.write_text(json.dumps(value))
        script = tmp_path / "evaluate.py"
        command = f"{sys.executable} -S -E {script} {tmp_path} {{model}} {least}"
        settings = {"command": command, "budget": budget, "seed": 3} | changes
        return evolve(path, tmp_path / out, Search(**settings), say)

    run.folder = tmp_path
    return run


def entries(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][1:]


def calls(folder):
    return (folder / "calls").stat().st_size if (folder / "calls").exists() else 0


def test_it_finds_the_best_coefficients(search, tools):
    best = search(48)
    log = entries(search.folder / "out")
    distances = [np.hypot(*np.subtract(list(e["values"].values()), [0.3, 0.8])) for e in log]
    assert log[0]["values"] == {
        "models[0].parameters.weight": 0.5,
        "models[1].parameters.weight": 0.5,
    }
    for entry, distance in zip(log, distances, strict=True):
        assert entry["score"] == pytest.approx(-(distance**2), abs=1e-6)
    assert np.mean(distances[-12:]) < 0.5 * np.mean(distances[:12])  # random search: about 1
    assert best["score"] == max(entry["score"] for entry in log) > -0.01
    assert not (search.folder / "out" / "scratch").exists()
    # best.yml is a plain configuration: merging it gives the model that had that score.
    done = tools.run(search.folder / "out" / "best.yml", search.folder / "merged", "--quiet")
    assert done.code == 0, done.err
    merged = tools.read_output(search.folder / "merged")["w"]
    np.testing.assert_allclose(merged, list(best["values"].values()), rtol=1e-6)


def test_it_continues_where_it_stopped(search):
    whole = search(12, out="whole")
    before = calls(search.folder)
    search(7)
    with open(search.folder / "out" / "log.jsonl", "a") as file:
        file.write('{"index": 7, "val')  # killed while writing
    assert calls(search.folder) == before + 7
    said = []
    best = search(12, say=said.append)
    assert calls(search.folder) == before + 12 and "7 candidates" in said[0]
    values = [
        [entry["values"] for entry in entries(search.folder / name)] for name in ("whole", "out")
    ]
    assert values[0] == values[1] and len(values[0]) == 12
    assert best["values"] == whole["values"]
    search(12)
    assert calls(search.folder) == before + 12
    with pytest.raises(MergeError, match=r"another search \(different: seed\)"):
        search(12, seed=4)


def test_candidates_that_fail_are_the_worst(search):
    said = []
    best = search(24, least=0.45, say=said.append, seed=5)
    log = entries(search.folder / "out")
    failed = [entry for entry in log if entry["score"] is None]
    assert 0 < len(failed) < 24 and len(log) == 24
    # The search leaves the region where they fail (taken for good ones, it would go into it).
    assert sum(entry["index"] >= 12 for entry in failed) <= len(failed) / 2
    assert all("x is too small" in entry["error"] for entry in failed)
    assert all(entry["values"]["models[0].parameters.weight"] < 0.45 for entry in failed)
    assert best["score"] is not None and any("failed: " in line for line in said)


def test_when_all_fail_it_stops(search):
    with pytest.raises(MergeError, match="all 6 candidates failed.*x is too small"):
        search(50, least=9)
    with pytest.raises(MergeError, match="more than 0.2 seconds"):
        sleep = f"{sys.executable} -S -c 'import time; time.sleep(60)' {{model}}"
        search(1, out="slow", command=sleep, timeout=0.2)


def test_minimizing_one_shared_value(search):
    def merged(weight):
        return {
            "merge_method": "task_arithmetic",
            "base_model": str(search.folder / "base"),
            "models": [
                {"model": str(search.folder / name), "parameters": {"weight": weight}}
                for name in "ab"
            ],
        }

    weight = {"search": [0.01, 1], "log": True, "name": "both", "start": 0.1}
    best = search(5, template=merged(weight), minimize=True)
    log = entries(search.folder / "out")
    assert [list(entry["values"]) for entry in log] == [["both"]] * 5
    assert log[0]["values"]["both"] == pytest.approx(0.1)
    assert best["score"] == min(entry["score"] for entry in log)


def test_interrupting_ends_the_command(search):
    search(1)  # writes the template
    template = search.folder / "template.yml"
    code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(99)"
    mark = search.folder / "pid"
    command = f'{sys.executable} -S -c "{code}" {mark} {{model}}'
    script = (
        "import sys; from pathlib import Path; from lm.merging.evolve import Search, evolve\n"
        "evolve(Path(sys.argv[1]), Path(sys.argv[2]), Search(sys.argv[3], budget=3))"
    )
    out = search.folder / "stopped"
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(template), str(out), command], stderr=subprocess.PIPE
    )
    try:
        limit = time.monotonic() + 60
        while not (mark.exists() and mark.read_text()) and time.monotonic() < limit:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert b"KeyboardInterrupt" in errors
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
    assert not (out / "scratch").exists() and entries(out) == []


def test_scores():
    assert read_score('x\n {"score": 0.25, "other": 1} \n\n') == 0.25
    assert read_score("loss\n-3e-2") == -0.03
    for text in ("", "nan", '{"score": NaN}', "accuracy: 3", '{"score": "3"}', "true", "[1]"):
        with pytest.raises(ValueError, match="score|nothing"):
            read_score(text)


def test_templates_that_cannot_work(search, tmp_path):
    path = tmp_path / "t.yml"
    for text, words in [
        ("a: 1", "nothing to search for"),
        ("a: {search: [1, 0]}", "low < high"),
        ("a: {search: 1}", r"must be \[low, high\]"),
        ("a: {search: [0, 1], log: true}", "above 0"),
        ("a: {search: [0, 1], start: 2}", "start must lie"),
        ("a: {search: [0, 1], strat: 2}", "did you mean 'start'"),
        ("a: {search: [0, 1], name: x}\nb: {search: [0, 2], name: x}", "another range"),
        ("a: [", "is not YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(MergeError, match=words):
            load_template(path)
    with pytest.raises(MergeError, match="must contain {model}"):
        Search("evaluate")
    with pytest.raises(MergeError, match="budget"):
        Search("evaluate {model}", budget=0)
    with pytest.raises(MergeError, match="did you mean 'linear'"):
        model = {"model": str(tmp_path / "a"), "parameters": {"weight": {"search": [0, 1]}}}
        search(3, template={"merge_method": "linaer", "models": [model]})
    assert calls(tmp_path) == 0  # told before any work
