"""scripts/report.py: where the page goes, and what is refused."""

import json

import pytest

from lm.cli import report
from lm.train.page import MARK


@pytest.fixture
def folder(tmp_path):
    """A run that has logged three steps."""
    made = tmp_path / "run"
    made.mkdir()
    rows = [{"step": s, "tokens": s, "loss": 1.0} for s in (1, 2, 3)]
    (made / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_page_of_one_run_lies_in_its_folder(folder, run_command):
    for _ in range(2):  # a page of ours may be drawn again
        code, out, _ = run_command(report.main, folder)
        assert code == 0 and out.strip() == str(folder / "report.html")
    assert MARK in (folder / "report.html").read_text()


def test_page_of_several_lies_here(folder, run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = folder.with_name("other")
    other.mkdir()
    (other / "config.json").write_text("{}")
    code, out, _ = run_command(report.main, folder, other)
    assert code == 0 and out.strip() == "report.html" and (tmp_path / "report.html").exists()


def test_what_is_no_report_is_not_written_over(folder, tmp_path, run_command):
    mine = tmp_path / "mine.html"
    mine.write_text("<p>my own")
    code, _, err = run_command(report.main, folder, "--output", mine)
    assert code == 2 and "exists and is not a report" in err
    assert mine.read_text() == "<p>my own"


def test_refused_in_one_line(folder, tmp_path, run_command):
    code, _, err = run_command(report.main, tmp_path)
    assert code == 2 and "holds no run" in err and err.count("\n") == 1
    code, _, err = run_command(report.main, folder, "--output", tmp_path / "no" / "x.html")
    assert code == 4 and "x.html" in err and err.count("\n") == 1
