"""AdaMerging: gradients, steps, replay, resuming, collapse; TIES's vectors for ++."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm
import lm.hf
from lm.merging.adaptive.adamerging import Coefficients, Learner
from lm.merging.adaptive.config import load_adaptive
from lm.merging.adaptive.data import batch_of
from lm.merging.adaptive.models import Models
from lm.merging.adaptive.objective import Monitor, entropy
from lm.merging.adaptive.vectors import Vectors
from lm.merging.session import Session


def test_entropy_and_its_gradient_have_the_known_values():
    z = jnp.asarray([[[2.0, -1.0, 0.5]]])
    value = lambda z: entropy(z, jnp.ones((1, 1))).entropy  # noqa: E731
    assert float(value(z)) == pytest.approx(0.6215846, abs=1e-6)
    expected = [-0.29874158, 0.10246425, 0.19627733]
    np.testing.assert_allclose(jax.grad(value)(z)[0, 0], expected, atol=1e-6)


def test_marginal_entropy_and_masks(rng):
    logits = rng.standard_normal((2, 3, 5)).astype("f4")
    counts = np.asarray([[1, 1, 0], [1, 0, 0]], "f4")
    p = np.exp(logits.astype("f8"))
    p /= p.sum(-1, keepdims=True)
    chosen = p[counts > 0]
    mean = chosen.mean(0)
    sums = entropy(jnp.asarray(logits), jnp.asarray(counts))
    assert float(sums.entropy) == pytest.approx(-(chosen * np.log(chosen)).sum(-1).mean(), rel=1e-5)
    assert float(sums.marginal) == pytest.approx(-(mean * np.log(mean)).sum(), rel=1e-5)
    z = logits[counts > 0].mean(0)
    q = np.exp(z) / np.exp(z).sum()
    averaged = entropy(jnp.asarray(logits), jnp.asarray(counts), average_logits=True)
    assert float(averaged.entropy) == pytest.approx(-(q * np.log(q)).sum(), rel=1e-5)


OPTIONS = {
    "layer_wise": True,
    "clip": True,
    "steps": 4,
    "examples": 8,
    "sequence_length": 16,
    "batch_size": 3,
    "learning_rate": 0.01,
    "positions": 4,
    "average_logits": False,
    "diversity": 0.0,
    "collapse": 0.5,
    "stop_on_collapse": False,
}


def learner_of(models, tmp_path, **changes):
    from lm.merging.adaptive.data import read_rows

    path = tmp_path / "c.json"
    entries = [
        {"model": str(tmp_path / n), "data": str(tmp_path / f"{n}.txt")} for n in models.names
    ]
    value = {"merge_method": "adamerging", "base_model": str(tmp_path / "base"), "models": entries}
    path.write_text(json.dumps(value))
    config = load_adaptive(path)
    loaded = Models(config.references())
    tokenizer, prefix = loaded.tokenizer()
    rows = [
        read_rows(task, tokenizer, prefix, length=16, examples=8, vocab=260)
        for task in config.models
    ]
    options = OPTIONS | changes
    names = list(loaded.infos) if options["layer_wise"] else [""]
    coefficients = Coefficients.start(names, [0.3] * len(rows))
    return Learner(loaded, Vectors(loaded), rows, options, coefficients), rows


def merged_tree(models, loaded, weights):
    """theta_0 + sum lambda tau with traced coefficients by (leaf path, index)."""
    tree = {}
    for name, places in loaded.places.items():
        for place in places:
            base = value = models["base"]
            for key in place.leaf.path:
                base = value = base[key]
            value = jnp.asarray(base[place.index])
            for k, other in enumerate(models["others"]):
                for key in place.leaf.path:
                    other = other[key]
                value = value + weights[name][k] * (other[place.index] - base[place.index])
            tree.setdefault(place.leaf.path, {})[place.index] = value
    result = {}
    for path, parts in tree.items():
        node = result
        for key in path[:-1]:
            node = node.setdefault(key, {})
        many = () not in parts
        node[path[-1]] = jnp.stack([parts[i] for i in sorted(parts)]) if many else parts[()]
    return result


def test_streamed_gradients_are_those_of_the_coefficients(family, tmp_path):
    """Against differentiation through the whole merge; GPT-2 has three matrices in one tensor."""
    models = family("gpt2", count=2)
    learner, rows = learner_of(models, tmp_path)
    trees = {"base": models.params["base"], "others": [models.params[n] for n in models.names]}

    def loss(weights):
        params = merged_tree(trees, learner.models, weights)
        total = 0.0
        for k, task in enumerate(rows):
            batch = batch_of(task, 0, size=3, positions=4, seed=0, stream=k)
            logits = lm.apply(models.config, params, jnp.asarray(batch.tokens))
            log_p = jax.nn.log_softmax(jnp.take_along_axis(logits, batch.index[..., None], 1))
            each = -jnp.sum(jnp.exp(log_p) * log_p, -1)
            total += jnp.sum(each * batch.counts) / batch.counts.sum()
        return total

    weights = {name: jnp.full(2, 0.3) for name in learner.models.infos}
    value, expected = jax.jit(jax.value_and_grad(loss))(weights)
    learner._params = learner.models.place(learner._over_tensors(learner._rebuild))
    found, grads = learner._gradient(0)
    assert sum(e for e, _ in found) == pytest.approx(float(value), rel=1e-5)
    for name in learner.models.infos:
        got = learner._inner(grads, learner._pieces(name))
        np.testing.assert_allclose(got, expected[name], rtol=2e-3, atol=1e-6, err_msg=name)


def test_steps_lower_the_entropy_and_are_adams(family, tmp_path):
    models = family(count=2)
    learner, _ = learner_of(models, tmp_path, batch_size=8)  # all rows in every batch
    before, _ = learner.step(0)
    c = learner.coefficients
    # The first step of Adam is the rate, against the sign of the gradient.
    moved = c.values - 0.3
    assert np.allclose(np.abs(moved[np.abs(moved) > 1e-12]), 0.01, rtol=1e-3)
    for step in range(1, 12):
        after, _ = learner.step(step)
    assert sum(after) < sum(before)
    task_wise, _ = learner_of(models, tmp_path, layer_wise=False)
    task_wise.step(0)
    assert task_wise.coefficients.values.shape == (1, 2)
    assert np.allclose(np.abs(task_wise.coefficients.values - 0.3), 0.01, rtol=1e-3)


def test_coefficients_outside_of_the_clip_have_no_gradient():
    c = Coefficients.start(["x"], [0.0, 1.0, 1.001, -0.001])
    c.update(0, np.ones(4), 0, 0.1, clip=True)
    np.testing.assert_allclose(c.values[0], [-0.1, 0.9, 1.001, -0.001])
    np.testing.assert_allclose(c.of("x", True), [0, 0.9, 1.0, 0])


def test_a_merge_replays_by_task_arithmetic(family, settings, merge, tmp_path, monkeypatch):
    models = family("gpt2", count=2)
    path = settings(
        models, "adamerging", parameters={"steps": 3, "learning_rate": 0.02, "batch_size": 2}
    )
    done = merge(path, devices=8)
    written = json.loads((done.out / "coefficients.json").read_text())
    weights = np.asarray(list(written["weights"].values()))
    assert weights.std() > 0.001 and (weights >= 0).all()
    Session(done.out / "task_arithmetic.yml", tmp_path / "again").run()
    first, again = (lm.hf.load(folder, "float32")[1] for folder in (done.out, tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    # The coefficients alone, without a step, give the same.
    path = settings(
        models,
        "adamerging",
        parameters={"steps": 0},
        coefficients=str(done.out / "coefficients.json"),
    )
    third = lm.hf.load(merge(path, "third", devices=8).out, "float32")[1]
    jax.tree.map(np.testing.assert_array_equal, first, third)
    # The files of a static merge are there.
    names = {file.name for file in Path(done.out).iterdir()}
    assert {"merge_manifest.json", "README.md", "config.json", "tokenizer.json"} <= names


def test_ties_vectors_are_the_papers(family, tmp_path):
    models = family(count=3)
    loaded = Models([str(tmp_path / n) for n in ("base", *models.names)])
    got = Vectors(loaded, density=0.2)
    raw = Vectors(loaded)
    pieces = [raw(piece)[1] for piece in loaded.pieces]
    flat = np.stack([np.concatenate([p[k] for p in pieces]) for k in range(3)]).astype("f8")
    size = flat.shape[1]
    kept = np.zeros_like(flat)
    for k in range(3):
        threshold = np.sort(np.abs(flat[k]))[::-1][int(0.2 * size)]
        kept[k] = flat[k] * (np.abs(flat[k]) >= threshold)
    sign = np.sign(kept.sum(0))
    sign[sign == 0] = 1 if sign.sum() > 0 else -1
    expected = kept * (np.sign(kept) == sign)
    ours = [got(piece)[1] for piece in loaded.pieces]
    for k in range(3):
        np.testing.assert_allclose(np.concatenate([p[k] for p in ours]), expected[k], atol=1e-7)


def test_learning_resumes_where_it_was_killed(family, settings, merge, tmp_path, monkeypatch):
    models = family(count=2)
    path = settings(models, "adamerging++", parameters={"steps": 5, "batch_size": 2})
    whole = merge(path, "whole")
    from lm.merging.adaptive import work

    monkeypatch.setattr(work.Work, "due", lambda self: True)
    real, calls = Learner.step, []

    def stopped(self, step):
        if step == 3 and calls == [0, 1, 2]:
            raise KeyboardInterrupt
        calls.append(step)
        return real(self, step)

    monkeypatch.setattr(Learner, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge(path, "part")
    assert not (tmp_path / "part").exists()
    with pytest.raises(lm.ConfigError, match="--resume"):
        merge(path, "part")
    with pytest.raises(lm.ConfigError, match="seed"):
        merge(path, "part", resume=True, seed=1)
    calls[:] = [-1]
    part = merge(path, "part", resume=True)
    assert calls == [-1, 3, 4] and any("continuing" in line for line in part.lines)
    for name in ("model.safetensors", "coefficients.json"):
        one, two = (json_or_bytes(folder / name) for folder in (whole.out, part.out))
        assert one == two, name
    assert not list(tmp_path.glob(".*adaptive"))
    again = merge(path, "part", resume=True)
    assert "nothing to do" in again.lines[-1]


def json_or_bytes(path):
    if path.suffix == ".json":
        return json.loads(path.read_text())["weights"]
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_the_monitor_tells_a_collapse_once():
    monitor = Monitor(0.5, ["one", "two"])
    lines = []
    for step in range(60):
        lines += monitor.see([2.0, 2.0 if step < 12 else 0.1])
    assert len(lines) == 1 and lines[0].startswith("two: predictions collapse")
    copy = Monitor(0.5, ["one", "two"])
    copy.restore(json.loads(json.dumps(monitor.state())))
    assert copy.see([2.0, 0.1]) == [] and copy.steps == 61


def test_a_collapse_stops_learning_if_asked(family, settings, merge, monkeypatch):
    models = family(count=2)
    monkeypatch.setattr(Monitor, "see", lambda self, values: ["a: predictions collapse"])
    parameters = {"steps": 5, "batch_size": 2, "stop_on_collapse": True}
    done = merge(settings(models, "adamerging", parameters=parameters))
    assert any(line == "stopped at step 1: stop_on_collapse" for line in done.lines)


def test_sharded_steps_are_those_of_one_device(family, tmp_path):
    from lm.sharding import make_mesh

    models = family(count=2)
    one, _ = learner_of(models, tmp_path)
    many, _ = learner_of(models, tmp_path)
    mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
    many.models = Models([str(tmp_path / n) for n in ("base", *models.names)], mesh)
    first, _ = one.step(0)
    with jax.set_mesh(mesh):
        second, _ = many.step(0)
    np.testing.assert_allclose(first, second, rtol=1e-5)
    leaf = many._params["layers"]["mlp"]["up"]["kernel"]
    assert len(leaf.sharding.device_set) == 4 and not leaf.sharding.is_fully_replicated
    np.testing.assert_allclose(one.coefficients.values, many.coefficients.values, atol=1e-6)


def test_runs_of_ours_are_models_too(family, settings, merge, tmp_path):
    from lm.cli.convert import ConvertArgs, convert

    models = family(count=2)
    path = settings(models, "adamerging", parameters={"steps": 2, "batch_size": 2})
    expected = merge(path, "expected").out
    for name in ("base", "b"):
        convert(ConvertArgs(src=str(tmp_path / name), dst=str(tmp_path / f"run-{name}"), to="run"))
    text = path.read_text()
    for name in ("base", "b"):
        text = text.replace(f'"{tmp_path / name}"', f'"{tmp_path / f"run-{name}"}"')
    path.write_text(text)
    assert text.count("run-") == 2
    out = merge(path, "from-runs").out
    trees = [lm.hf.load(folder, "float32")[1] for folder in (expected, out)]
    jax.tree.map(np.testing.assert_array_equal, *trees)
