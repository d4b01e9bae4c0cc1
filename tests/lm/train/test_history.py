"""Reading runs that were killed, resumed, torn, copied or never began."""

import json
import math
import time

import pytest

from lm.config import ConfigError
from lm.train.history import read_histories, read_history


@pytest.fixture
def run(tmp_path):
    """run(rows, name) makes a run folder of these lines; dictionaries become JSON."""

    def make(rows, name="run", config=True, **files):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = [row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows]
        (folder / "metrics.jsonl").write_text("".join(lines))
        if config:
            (folder / "config.json").write_text(json.dumps({"recipe": "tiny", "steps": 40}))
        for file, value in files.items():
            (folder / f"{file}.json").write_text(json.dumps(value))
        return folder

    return make


def row(step, loss=2.0, **more):
    return {"step": step, "tokens": step * 8, "loss": loss} | more


def evaluation(step, loss=2.0):
    return {"step": step, "tokens": step * 8, "eval_loss": loss}


def test_steps_that_were_logged_again_count_once(run):
    """As where the logs of two starts were put together."""
    rows = [row(1), row(2), evaluation(2), row(3, 7.0), row(4, 7.0), evaluation(4, 7.0)]
    rows += [row(3, 1.0), row(4, 1.0), evaluation(4, 1.0), row(5, 1.0)]
    found = read_history(run(rows))
    assert [r["step"] for r in found.training] == [1, 2, 3, 4, 5]
    assert [r["loss"] for r in found.training] == [2, 2, 1, 1, 1]
    assert [(r["step"], r["eval_loss"]) for r in found.evaluations] == [(2, 2.0), (4, 1.0)]
    assert found.starts == 2


def test_the_same_step_again(run):
    found = read_history(run([row(1), row(2, 5.0), evaluation(2, 5.0), row(2, 1.0)]))
    assert [r["loss"] for r in found.training] == [2.0, 1.0] and found.evaluations == []


def test_torn_last_line_and_lines_that_are_no_rows(run):
    found = read_history(
        run([row(1), "what?\n", '{"loss": 1}\n', "[1]\n", row(2), '{"step": 3, "lo'])
    )
    assert [r["step"] for r in found.rows] == [1, 2] and found.unreadable == 3


def test_values_that_are_not_finite(run):
    found = read_history(run([row(1, "NaN"), row(2, "-Infinity")]))
    assert math.isnan(found.rows[0]["loss"]) and found.rows[1]["loss"] == -math.inf


def test_metrics_alone_and_nothing_yet(run, tmp_path):
    folder = run([row(1, **{"seconds/step": 3.0, "seconds/init": 1.0})], config=False)
    alone = read_history(folder / "metrics.jsonl")
    assert alone.name == "metrics" and alone.config == {} and len(alone.rows) == 1
    assert alone.spent() == {"step": 3.0, "init": 1.0}
    empty = read_history(run([], "empty"))
    assert empty.rows == [] and empty.starts == 0 and empty.spent() == {}
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    assert read_history(tmp_path / "begun").rows == []


def test_what_is_no_run(tmp_path, run):
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        read_history(tmp_path / "nowhere")
    (tmp_path / "photos").mkdir()
    with pytest.raises(ConfigError, match="photos holds no run .neither metrics.jsonl nor"):
        read_history(tmp_path / "photos")
    folder = run([row(1)])
    with pytest.raises(ConfigError, match="given twice"):
        read_histories([folder, folder])


def test_equal_names_are_told_apart(run):
    names = [h.name for h in read_histories([run([], "a/x"), run([], "b/x"), run([], "b/y")])]
    assert names[0].endswith("a/x") and names[1].endswith("b/x") and names[2] == "y"


@pytest.mark.parametrize(
    ("events", "summary", "age", "status"),
    [
        ([{"kind": "end", "reason": "finished"}], None, 0, "finished"),
        ([{"kind": "end", "reason": "Stopped: by SIGTERM"}], None, 9999, "Stopped: by SIGTERM"),
        ([{"kind": "start", "step": 0}], None, 5, "running"),
        ([{"kind": "start", "step": 0}], None, 9999, "not ended, silent since"),
        ([], {"steps": 3}, 9999, "finished"),
        # resumed after it had ended
        ([{"kind": "end", "reason": "x"}, {"kind": "start", "step": 0}], {}, 5, "running"),
    ],
)
def test_what_became_of_it(run, events, summary, age, status):
    folder = run([row(1)], **({} if summary is None else {"summary": summary}))
    text = "".join(json.dumps(event | {"time": 1.0}) + "\n" for event in events)
    if events:
        (folder / "timeline.jsonl").write_text(text)
    assert read_history(folder).status(time.time() + age).startswith(status)
