import json

import pytest

from lm.sweep import Sweep, best

RUNS = [
    {"name": name, "learning_rate": rate, "seed": seed}
    for name in "ab"
    for rate in (0.1, 0.2)
    for seed in (0, 1)
]


def execute(run):
    return {"final": run["learning_rate"] * (1 if run["name"] == "a" else -1) + run["seed"]}


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path / "deep" / "runs.jsonl", RUNS)


def go(sweep, *words, execute=execute, report=None):
    return sweep.main(list(words), execute, report or (lambda rows: None))


def test_every_run_is_done_once_and_a_rerun_skips_what_is_there(sweep):
    assert go(sweep, "--limit", "3") == 0
    assert [row["run"] for row in sweep.rows()] == RUNS[:3]
    done = []
    go(sweep, execute=lambda run: done.append(run) or execute(run))
    assert done == RUNS[3:] and sweep.missing() == []
    row = sweep.rows()[-1]
    assert row["result"] == {"final": pytest.approx(0.8)}
    assert set(row) == {"run", "result", "seconds", "device", "versions", "date"}
    assert "jax" in row["versions"]


def test_list_shows_what_is_missing_and_runs_nothing(sweep, capsys):
    go(sweep, "--limit", "6")
    capsys.readouterr()
    go(sweep, "--list", execute=lambda run: pytest.fail("must not run"))
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines[:-1]] == RUNS[6:]
    assert lines[-1].startswith("2 of 8 runs are missing")


def test_only_picks_runs_by_value(sweep):
    go(sweep, "--only", "name=b", "--only", "learning_rate=0.2,0.4")
    assert [row["run"] for row in sweep.rows()] == RUNS[6:]
    with pytest.raises(SystemExit, match="KEY=VALUE, got 'name'"):
        go(sweep, "--only", "name")


def test_report_reads_the_file_alone(sweep):
    go(sweep, "--limit", "2")
    seen = []
    go(sweep, "--report", execute=lambda run: pytest.fail("must not run"), report=seen.extend)
    assert [row["run"] for row in seen] == RUNS[:2]


def test_a_line_that_a_kill_cut_short_is_done_again(sweep):
    go(sweep, "--limit", "3")
    text = sweep.path.read_text()
    sweep.path.write_text(text[:-20])
    assert sweep.missing() == RUNS[2:]
    go(sweep, "--limit", "1")
    assert [row["run"] for row in sweep.rows()] == RUNS[:3]


def test_best_is_the_rate_of_the_lowest_mean_and_a_diverged_run_loses(sweep):
    go(sweep)
    assert best(sweep.rows(), "name", "final") == {"a": 0.1, "b": 0.2}
    rows = [row for row in sweep.rows() if row["run"]["name"] == "b"]
    rows[-1]["result"]["final"] = None
    assert best(rows, "name", "final") == {"b": 0.1}
