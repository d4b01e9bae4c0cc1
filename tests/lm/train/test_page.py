"""The HTML page of runs: whole, self-contained, and the same numbers as the log's."""

import html.parser
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lm.train.metrics import MetricsLog
from lm.train.page import write_page
from lm.train.page_data import thin
from lm.train.timeline import Timeline


@pytest.fixture
def run(tmp_path):
    """run(name, rows) writes a run through the writers of the training loop."""

    def make(name, rows=(), config=None, timeline=True):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"steps": 90, **(config or {})}))
        with MetricsLog(folder / "metrics.jsonl") as log:
            for row in rows:
                log.write(row)
        if timeline:
            now = [1000.0]
            line = Timeline(folder / "timeline.jsonl", {"step": 0}, 1000.0, *[lambda: now[0]] * 2)
            line.waited(0, idle=True)
            for step in range(1, 31):
                now[0] += 2.0
                line.step(step)
            line.close("finished")
        return folder

    return make


def rows(steps=30, **more):
    return [
        {"step": s, "tokens": 10 * s, "loss": 3.0 - s / 100, "grad_norm": 1.0, "time": 1000.0 + s}
        | more
        for s in range(1, steps + 1)
    ]


class Page(html.parser.HTMLParser):
    """The parts of a page that matter here; checks that tags are closed in order."""

    VOID = {"meta", "input", "br", "link", "img"}

    def __init__(self, text):
        super().__init__()
        self.figures, self.loads, self.stack, self.words = [], [], [], []
        self.data = None
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [v for k, v in attributes.items() if k in ("src", "href", "srcset")]
        if "data-key" in attributes:
            self.figures.append(attributes["data-key"])
        if tag not in self.VOID:
            self.stack.append((tag, attributes.get("id")))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, text):
        if self.stack and self.stack[-1] == ("script", "data"):
            self.data = json.loads(text)
        elif self.stack and self.stack[-1][0] not in ("script", "style"):
            self.words.append(text)


def made(paths, tmp_path):
    output = tmp_path / "page.html"
    write_page(paths, output)
    text = output.read_text()
    return Page(text), text


def column(page, key, run=0):
    """{step: value} of a series as the page holds it."""
    for table in page.data["runs"][run]["tables"]:
        if key in table["series"]:
            places, values = table["series"][key]
            return {table["x"]["step"][i]: v for i, v in zip(places, values, strict=True)}
    return None


def test_one_run(run, tmp_path):
    page, text = made([run("a", rows(**{"grad_norm/mlp": 0.5}))], tmp_path)
    assert page.loads == [] and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text and "@import" not in text
    assert page.figures[0] == "loss" and "grad_norm/mlp" in page.figures
    assert column(page, "loss") == {s: pytest.approx(3 - s / 100) for s in range(1, 31)}
    durations = column(page, "step_duration")  # from the timeline: each step but the compiled one
    assert durations == {s: 2.0 for s in range(2, 31)}
    words = " ".join(page.words)
    assert "finished" in words and "30 of 90" in words and "training 96.7% (0:58)" in words


def test_several_runs_and_how_they_differ(run, tmp_path):
    paths = [
        run("a", rows(), {"optim": {"learning_rate": 1.0, "beta1": 0.9}, "out": "a"}),
        run("b", rows(20), {"optim": {"learning_rate": 2.0, "beta1": 0.9}, "out": "b"}, False),
    ]
    page, text = made(paths, tmp_path)
    assert [r["name"] for r in page.data["runs"]] == ["a", "b"]
    assert len({r["color"] for r in page.data["runs"]}) == 2
    assert len(column(page, "loss", 1)) == 20
    table = text.partition("Settings that differ")[2].partition("</table>")[0]
    assert "optim.learning_rate" in table and "beta1" not in table and ">out<" not in table


def test_lost_work_and_the_time_between_two_starts_are_seen(run, tmp_path):
    folder = run("a", rows())
    now = [1120.0]  # killed after step 30, at 1060
    line = Timeline(folder / "timeline.jsonl", {"step": 20}, now[0], *[lambda: now[0]] * 2)
    line.waited(0, idle=True)
    for step in range(21, 41):
        now[0] += 2.0
        line.step(step)
    line.close("finished")
    page, text = made([folder], tmp_path)
    strip = text.partition('<div class="strip"')[2].partition("</div>")[0]
    pieces = re.findall(r'left:([\d.]+)%;width:([\d.]+)%.*?title="([^",]*), ', strip)
    named = [
        (name, round(float(left) * 1.6), round(float(width) * 1.6)) for left, width, name in pieces
    ]
    assert named == [
        *(("compile", 0, 2), ("training", 2, 38), ("lost work", 40, 20), ("down", 60, 60)),
        *(("compile", 120, 2), ("training", 122, 38)),
    ]
    durations = column(page, "step_duration")
    assert set(durations) == {*range(2, 21), *range(22, 41)}  # 21 was compiled in
    assert "lost work 12.5% (0:20)" in " ".join(page.words)


def test_values_that_are_not_finite_are_strings(run, tmp_path):
    values = rows(4)
    for row, value in zip(values, (math.nan, math.inf, -math.inf, 1.0), strict=True):
        row["loss"] = value
    page, _ = made([run("a", values)], tmp_path)
    assert column(page, "loss") == {1: "nan", 2: "inf", 3: "-inf", 4: 1.0}


@pytest.mark.parametrize("kept", ["metrics.jsonl", "config.json"])
def test_with_a_part_of_a_run_only(run, tmp_path, kept):
    folder = run("a", rows() if kept == "metrics.jsonl" else [])
    for file in folder.iterdir():
        if file.name != kept:
            file.unlink()
    page, text = made([folder], tmp_path)
    assert ("Nothing has been logged yet" in text) == (kept == "config.json")
    assert "not recorded" in text


def test_a_run_that_is_still_going_on(run, tmp_path):
    folder = run("a", rows(), timeline=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "lo')
    page, text = made([folder], tmp_path)
    assert "running" in text and max(column(page, "loss")) == 30


def test_names_and_values_cannot_break_out_of_the_page(run, tmp_path):
    evil = "</script><script>alert(1)</script>"
    folder = run("a", rows(3), {"recipe": evil, "note": "<!--"})
    folder = folder.rename(folder.with_name("<b>&"))
    page, text = made([folder], tmp_path)
    assert "alert(1)</script>" not in text and page.data["runs"][0]["name"] == "<b>&"


def test_thinning_keeps_ends_spikes_and_what_is_not_finite():
    values = [(i, math.sin(i / 500)) for i in range(20_000)]
    values[7_777] = (7_777, 50.0)
    values[12_345] = (12_345, math.nan)
    kept = thin(values, 300)
    assert len(kept) < 320 and [i for i, _ in kept] == sorted({i for i, _ in kept})
    assert {0, 19_999, 7_777, 12_345} <= {i for i, _ in kept}
    assert thin(values[:300], 300) == values[:300]


def test_a_long_run_makes_a_small_page(run, tmp_path):
    many = [
        {"step": s, "tokens": s, "loss": math.sin(s)} | {f"spectrum/x/{k}": s / 7 for k in range(9)}
        for s in range(1, 4001)
    ]
    _, text = made([run("a", many, timeline=False)], tmp_path)
    assert len(text) < 300_000


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_script_draws_and_answers(run, tmp_path):
    """page.js against a document of a few lines; it must not place anything at NaN."""
    values = rows()
    values[9]["loss"] = math.nan
    values[20:20] = [{"step": 20, "tokens": 200, "eval_loss": 2.9, "time": 1020.0}]
    paths = [run("a", values), run("b", rows(1), timeline=False), run("c", [], timeline=False)]
    page, text = made(paths, tmp_path)
    (tmp_path / "page.json").write_text(json.dumps({"figures": page.figures, "data": page.data}))
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    (tmp_path / "page.js").write_text(script)
    trial = Path(__file__).with_name("page_try.js")
    done = subprocess.run(
        ["node", str(trial), str(tmp_path / "page.json"), str(tmp_path / "page.js")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["all"] == 3 and seen["crosses"] == 1  # a's loss, b's loss, a's held-out loss
    assert seen["smooth"] == 5  # the two training losses also as they were
    assert re.search(r"step \d.* a loss 2\.\d.* a eval_loss 2\.9", seen["tip"])
    assert seen["hidden"] == 2  # run b alone
