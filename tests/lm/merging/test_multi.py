"""Merges in stages."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.merging.manifest import Workplace
from lm.merging.multi import describe_stages, finished, run_stages
from lm.merging.session import Session
from lm.merging.stages import read_stages
from lm.merging.types import MergeError, StorageError

STAGES = """\
name: sum
merge_method: task_arithmetic
base_model: {base}
models:
  - model: mean
  - model: {{model: {{path: {a}}}}}
parameters: {{weight: 0.5}}
dtype: float32
---
# what the first one needs comes second
name: mean
merge_method: linear
models: [{{model: {a}}}, {{model: {b}}}]
parameters: {{weight: [0.2, 0.4]}}
dtype: float32
---
merge_method: slerp
base_model: sum
models: [{{model: mean}}]
parameters: {{t: 0.25}}
dtype: float32
"""


@pytest.fixture
def stages(family):
    """`write(text)`: a file of stages; `make`: sessions that are recorded in `made` when run."""
    paths = {name: family.folder / name for name in ("base", "a", "b")}
    made = []

    def write(text=STAGES, name="stages.yml"):
        path = family.folder / name
        path.write_text(text.format(**paths))
        return path

    def make(config, out, final, stores):
        session = Session(config, out, jobs=2, stores=stores, say=lambda _: None)
        merge = session.run

        def recorded(*arguments):
            made.append(out.name)
            merge(*arguments)

        session.run = recorded
        return session

    def run(path, out="out", **options):
        return run_stages(
            read_stages(path), family.folder / out, make, say=lambda _: None, **options
        )

    return SimpleNamespace(
        write=write, make=make, made=made, run=run, folder=family.folder, paths=paths
    )


def by_hand(stages, tools):
    """The same as three merges one after the other, in folders named as a user would."""
    documents = STAGES.format(**stages.paths).split("---\n")
    folders = {name: stages.folder / "hand" / name for name in ("mean", "sum", "final")}
    for name, text in zip(("mean", "sum", "final"), (documents[1], *documents[::2]), strict=True):
        text = "\n".join(line for line in text.splitlines() if not line.startswith("name:"))
        for stage in ("mean", "sum"):
            text = text.replace(f"model: {stage}", f"model: {folders[stage]}")
        path = stages.folder / f"{name}.yml"
        path.write_text(text)
        Session(path, folders[name], say=lambda _: None).run()
    return tools.read_output(folders["final"])


def test_stages_give_what_single_merges_give(stages, tools):
    path = stages.write()
    stages.run(path)
    assert stages.made == ["mean", "sum", "out"]
    got, wanted = tools.read_output(stages.folder / "out"), by_hand(stages, tools)
    assert set(got) == set(wanted)
    for name, value in got.items():
        np.testing.assert_array_equal(value.view(np.uint32), wanted[name].view(np.uint32))
    left = {item.name for item in stages.folder.iterdir()}
    assert not any(name.startswith(".") for name in left)
    record = json.loads((stages.folder / "out" / "merge_stages.json").read_text())
    assert record["config"] == path.read_text()
    # The card names stages and models, not the folders they were in for a while.
    for name in ("merge_config.yml", "README.md"):
        assert str(stages.folder / ".out") not in (stages.folder / "out" / name).read_text()


def test_intermediate_models_are_kept_where_one_says(stages, tools):
    path = stages.write(
        STAGES + "---\nname: spare\nmerge_method: linear\nmodels: [{{model: sum}}]\n"
        "parameters: {{weight: 1}}\n"
    )
    with pytest.raises(MergeError, match="no stage uses spare"):
        stages.run(path)
    keep = stages.folder / "keep"
    stages.run(path, intermediate=keep)
    assert {item.name for item in keep.iterdir()} == {"mean", "sum", "spare"}
    for name, value in tools.read_output(keep / "spare").items():
        np.testing.assert_array_equal(value, tools.read_output(keep / "sum")[name])
    with pytest.raises(MergeError, match="add --resume"):
        stages.run(path, "other", intermediate=keep)


def test_the_only_stage_that_none_uses_is_the_final_one(stages, tools):
    named = STAGES.replace("merge_method: slerp", "name: end\nmerge_method: slerp")
    documents = named.split("---\n")
    stages.run(stages.write("---\n".join(documents[::-1])))
    assert stages.made == ["mean", "sum", "out"]


def interrupted(stages, name="out", begun=False):
    """Stages stopped before that one, or when it has `begun` and all its pieces are written."""
    path = stages.write()
    complete = Workplace.complete

    def make(config, out, final, stores):
        session = stages.make(config, out, final, stores)
        if out.name == name and not begun:
            session.run = stop
        return session

    def stop(*_):
        raise KeyboardInterrupt

    def complete_or_stop(place, *arguments):
        if place.out.name == name:
            raise KeyboardInterrupt
        complete(place, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Workplace, "complete", complete_or_stop)
        run_stages(read_stages(path), stages.folder / "out", make, say=lambda _: None)
    return path, stages.folder / ".out.stages"


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("name", ["sum", "out"])
def test_resuming_keeps_what_is_finished(stages, tools, name, begun):
    path, folder = interrupted(stages, name, begun)
    before = (folder / "mean" / "model.safetensors").stat()
    with pytest.raises(MergeError, match="add --resume"):
        stages.run(path)
    seen = []
    stages.run(
        path,
        resume=True,
        after=lambda _: seen.append((folder / "mean" / "model.safetensors").stat()),
    )
    assert (seen[0].st_ino, seen[0].st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    got, wanted = tools.read_output(stages.folder / "out"), by_hand(stages, tools)
    for name, value in got.items():
        np.testing.assert_array_equal(value.view(np.uint32), wanted[name].view(np.uint32))
    assert not folder.exists()


def test_what_cannot_work_in_the_end_shows_at_the_beginning(stages, tools):
    last = """\
merge_method: passthrough
slices:
  - sources: [{{model: mean, layer_range: [0, 2]}}]
  - sources: [{{model: sum, layer_range: [1, LAST]}}]
"""
    documents = STAGES.split("---\n")[:2]
    path = stages.write("---\n".join([*documents, last.replace("LAST", "9")]))
    with pytest.raises(MergeError, match=r"the final stage: .*\[1, 9\] goes beyond"):
        stages.run(path)
    assert not stages.made and not (stages.folder / ".out.stages").exists()
    # The plan on results that do not exist yet is the one that is made in the end.
    path = stages.write("---\n".join([*documents, last.replace("LAST", "2")]))
    text, _ = describe_stages(read_stages(path), stages.folder / "out", stages.make)
    stages.run(path)
    count = len(tools.read_output(stages.folder / "out"))
    assert f"{count} tensors, " in text.rpartition("==")[2]


def test_a_damaged_stage_is_found(stages):
    path, folder = interrupted(stages)
    file = folder / "mean" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    stat = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(StorageError, match=r"stage 'mean': .*damaged \(\S+\)"):
        stages.run(path, resume=True)
    assert not (stages.folder / "out").exists()


def test_resuming_with_other_stages_or_inputs_is_refused(stages, tools):
    interrupted(stages)
    path = stages.write(STAGES.replace("[0.2, 0.4]", "[0.3, 0.4]"))
    with pytest.raises(MergeError, match=r"stage 'mean': .*another configuration"):
        stages.run(path, resume=True)
    assert not (stages.folder / "out").exists()


def test_a_finished_result_is_known_again(stages):
    path, out = stages.write(), stages.folder / "out"
    found = read_stages(path)
    assert not finished(found, out, None)
    stages.run(path)
    removed = stages.folder / ".out.stages.removed"
    removed.mkdir()  # a kill while the intermediate models were being removed
    assert finished(found, out, None)
    assert not removed.exists()
    with pytest.raises(MergeError, match="another configuration"):
        finished(found, out, None, "another seed")
    other = read_stages(stages.write(STAGES.replace("0.25", "0.5"), "other.yml"))
    with pytest.raises(MergeError, match="another configuration"):
        finished(other, out, None)
    os.utime(stages.folder / "a" / "model.safetensors", ns=(1, 1))
    with pytest.raises(MergeError, match="other inputs"):
        finished(found, out, None)


def test_folders_of_the_user_stay(stages):
    path = stages.write()
    theirs = stages.folder / ".out.stages"
    theirs.mkdir()
    (theirs / "diary").write_text("x")
    with pytest.raises(MergeError, match="diary"):
        stages.run(path, resume=True)
    assert (theirs / "diary").read_text() == "x"
    (stages.folder / "file").write_text("x")
    with pytest.raises(MergeError, match="not a folder"):
        stages.run(path, intermediate=stages.folder / "file")
    with pytest.raises(MergeError, match="intermediate folder"):
        stages.run(path, "keep/sum", intermediate=stages.folder / "keep")


ONE = "merge_method: linear\nmodels: [{{model: {a}}}{more}]\nparameters: {{weight: 1}}\n"


def document(name, *needs):
    more = "".join(f", {{{{model: {need}}}}}" for need in needs)
    head = f"name: {name}\n" if name else ""
    return head + ONE.replace("{more}", more)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([document("x", "y"), document("y", "z"), document("z", "x")], "circle: x -> y -> z -> x"),
        ([document("x", "x"), document(None, "x")], "circle: x -> x"),
        ([document("first"), document(None, "frist")], "'frist' .did you mean 'first'"),
        ([document("x"), document("x")], "two stages are called 'x'"),
        ([document(None), document(None)], "documents 1 and 2 have no name"),
        ([document("x"), document("y")], "no stage uses any of x, y"),
        ([document("a/b"), document(None)], "plain folder name, got 'a/b'"),
        ([document("'..'"), document(None)], "plain folder name"),
        ([document("7"), document(None)], "plain folder name, got 7"),
        ([document("union"), document(None)], "'union'"),
        ([document("x"), "- 1\n"], "document 2 must be a mapping"),
        ([document("x"), "merge_method: linaer\n"], "linaer|models, slices"),
        ([document("x"), document(None, "x") + "dtyp: float32\n"], "did you mean 'dtype'"),
        ([document("x"), document("y", "x") + "models: []\n"], "models"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_done(stages, documents, message):
    path = stages.write("---\n".join(documents))
    with pytest.raises(MergeError, match=message) as caught:
        read_stages(path)
    assert "\n" not in str(caught.value) and "stages.yml" in str(caught.value)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_to_the_file_is_one_line_or_still_stages(stages, data):
    text = STAGES.format(**stages.paths)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        stop = start + data.draw(st.integers(0, 12))
        put = data.draw(
            st.sampled_from(["", ":", "[", "- ", "\n", "---\n", "name: ", "&a ", "{", "x"])
        )
        text = text[:start] + put + text[stop:]
    path = stages.folder / "damaged.yml"
    path.write_text(text)
    try:
        found = read_stages(path)
    except MergeError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert found is None or len(found.order) > 1


def test_a_long_chain_is_no_trouble(stages):
    documents = [document(f"s{n}", f"s{n + 1}") for n in range(600)]
    found = read_stages(stages.write("---\n".join([*documents, document("s600")])))
    assert [stage.name for stage in found.order] == [f"s{n}" for n in range(600, -1, -1)]


def test_one_merge_is_not_stages(stages, family, tools):
    assert read_stages(stages.write(document(None))) is None
    assert read_stages(stages.write("---\n" + document(None) + "---\n")) is None
    assert read_stages(stages.folder / "missing.yml") is None


def test_names_stand_wherever_a_model_does(stages):
    text = (
        document("x")
        + "---\n"
        + """\
merge_method: linear
slices:
  - sources:
      - {{model: x+{b}, layer_range: [0, 1]}}
      - {{model: {{model: {{path: x}}, lora: {{path: {b}}}}}, layer_range: [0, 1]}}
parameters: {{weight: 1}}
tokenizer:
  source: x
  tokens:
    <s>: {{source: x}}
    </s>: {{source: {{kind: model_token, model: x, token_id: 1}}}}
chat_template: x{{{{ y }}}}
"""
    )
    found = read_stages(stages.write(text))
    last = found.order[-1]
    assert last.needs == ("x",)
    config = found.config(last, stages.folder / "mid")
    place, lora = str(stages.folder / "mid" / "x"), str(stages.folder / "b")
    sources = config.slices[0].sources
    assert [source.model for source in sources] == [f"{place}+{lora}"] * 2
    assert config.tokenizer.source == place
    assert {token.model for token in config.tokenizer.tokens.values()} == {place}
    assert config.chat_template == "x{{ y }}"


def test_a_dry_run_tells_what_it_can(stages, tools):
    path, out = stages.write(), stages.folder / "out"
    before = tools.digest(stages.folder)
    text, session = describe_stages(read_stages(path), out, stages.make)
    assert session is None and tools.digest(stages.folder) == before
    assert "model.norm.weight [32] float32 linear" in text
    assert "the final stage" in text and "when sum, mean is made" in text
    interrupted(stages)
    text, session = describe_stages(read_stages(path), out, stages.make, resume=True)
    assert text.count("finished") == 2 and "float32 slerp {t: 0.25}" in text
    assert session.plan.jobs and not out.exists()


def test_from_the_command_line(stages, tools):
    path, out = stages.write(), stages.folder / "out"
    done = tools.run(path, out, "--report", "--jobs", "1")
    assert done.code == 0, done.err
    assert "stage 3 of 3" in done.err
    report = json.loads((out / "report.json").read_text())
    assert report["methods"] == ["slerp"] and report["model"]["drift"]
    assert not (stages.folder / ".out.stages").exists()
    again = tools.run(path, out, "--resume")
    assert again.code == 0 and "already complete" in again.err
    other = tools.run(path, out, "--resume", "--seed", "1")
    assert other.code == 2 and other.err.count("\n") == 1
    single = tools.run(stages.write(document(None), "one.yml"), out, "--intermediate-dir", "x")
    assert single.code == 2 and "single merge" in single.err
