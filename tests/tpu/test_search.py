"""--search: what is tried, in which order, and how plans are ranked; nothing is compiled here."""

import dataclasses
import math

import pytest

from lm import recipes
from lm.config import ConfigError
from tpu import chips, estimate, search


@pytest.fixture(scope="module")
def found():
    """All candidates of an 8B model on 8 H200."""
    return list(search.candidates(recipes.get("llama3_8b"), chips.parse_target("h200:8")))


def test_every_candidate_fills_the_devices_and_can_run(found):
    assert len(found) > 20
    for each in found:
        mesh = dataclasses.asdict(each.config.mesh)
        assert math.prod(mesh.values()) == 8
        assert mesh["expert"] == 1  # a dense model has none
        rows = each.config.batch_size / each.config.micro_batches
        assert rows % (mesh["data"] * mesh["fsdp"]) == 0


def test_arithmetic_knows_what_replicas_cost(found):
    """8.03 billion parameters, f32 with Adam and a gradient: 16 bytes, 128 GB on every replica."""
    sizes = {}
    for each in found:
        mesh, run = each.config.mesh, each.config
        if run.model.remat == "full" and run.micro_batches == 1:
            sizes[mesh.data, mesh.fsdp, mesh.tensor] = each.bytes
    assert sizes[8, 1, 1] - sizes[1, 8, 1] == pytest.approx(8.03e9 * 16 * 7 / 8, rel=0.01)
    assert sizes[8, 1, 1] > chips.parse_target("h200:8").memory > sizes[1, 8, 1]


def test_what_should_fit_is_compiled_first_and_meshes_vary(found):
    limit = chips.parse_target("h200:8").memory
    taken = search.shortlist(found, limit, 8)
    assert len(taken) == 8 and all(each.bytes <= limit for each in taken)
    assert len({each.config.mesh for each in taken}) >= 2
    assert [each.seconds for each in taken] == sorted(each.seconds for each in taken)
    # Where nothing fits, what needs least comes first.
    (least,) = search.shortlist(found, 1.0, 1)
    assert least.bytes == min(each.bytes for each in found)


def test_a_mesh_that_fits_is_ranked_before_one_that_does_not(found, monkeypatch):
    """The order of --search, with arithmetic in the place of the compiler."""
    by_config = {each.config: each for each in found}

    def arithmetic(config, target, compiler, memory):
        each, limit = by_config[config], memory or target.memory
        return {
            "fits": each.bytes <= limit, "bytes_limit": limit, "step_seconds": each.seconds,
            "bytes_per_device": {"total": each.bytes}, "mfu": 0.4,
        }  # fmt: skip

    monkeypatch.setattr(estimate, "make_plan", arithmetic)
    whole = [each for each in found if each.config.micro_batches == 1]
    monkeypatch.setattr(search, "candidates", lambda *_: whole)
    plans = search.search(recipes.get("llama3_8b"), chips.parse_target("h200:8"), "cpu", limit=200)
    fits = [plan["fits"] for plan in plans]
    assert True in fits and False in fits
    assert fits == sorted(fits, reverse=True)
    times = [plan["step_seconds"] for plan in plans if plan["fits"]]
    assert times == sorted(times)
    lines = search.render(plans).splitlines()
    assert lines[0].startswith("1. --mesh.") and "NO FIT" in lines[-1]


def test_a_plan_without_time_or_size_is_ranked_last():
    plan = lambda fits, took, size: {  # noqa: E731
        "fits": fits, "step_seconds": took, "bytes_per_device": {"total": size}
    }  # fmt: skip
    small, large, slow = plan(None, None, 1), plan(None, None, 2), plan(True, 2.0, 1)
    refused, fast = plan(False, None, None), plan(True, 1.0, 5)
    assert search.rank([large, small]) == [small, large]
    assert search.rank([refused, slow, fast]) == [fast, slow, refused]


def test_experts_are_spread_where_there_are_some():
    run = recipes.get("qwen3_30b_a3b")
    found = list(search.candidates(run, chips.parse_target("v5p:2x4x4")))
    meshes = {each.config.mesh.expert for each in found}
    assert meshes >= {1, 2, 4, 8, 16, 32}


def test_the_flags_make_the_candidate(found):
    from lm.cli.args import parse_run

    for each in found[::17]:
        again = parse_run(["llama3_8b", *search.flags(each.config).split()])
        assert again == each.config


def test_no_mesh_at_all():
    with pytest.raises(ConfigError, match="no mesh of these devices"):
        search.shortlist([], None, 4)
