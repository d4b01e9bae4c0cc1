"""Gradients of entropies in pieces of the vocabulary are those of all logits at once."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm
from lm.hf.tensors import by_path
from lm.merging.adaptive.data import Rows, batch_of, stacked
from lm.merging.adaptive.gradient import entropy_gradient
from lm.merging.adaptive.head import Head, head_entropies
from lm.merging.adaptive.models import Piece
from lm.merging.adaptive.objective import entropy, task_entropies


@pytest.mark.parametrize("rows,cap,chunk", [(True, None, 7), (False, 1.5, 8), (True, 3.0, 50)])
def test_chunks_of_words_are_the_whole_vocabulary(rng, rows, cap, chunk):
    w = jnp.asarray(rng.standard_normal((20, 6)), jnp.float32)
    w = w if rows else w.T
    z = jnp.asarray(rng.standard_normal((8, 6)), jnp.float32)
    counts = jnp.asarray([1, 1, 0, 1, 1, 1, 1, 0], jnp.float32)
    task = jnp.repeat(jnp.arange(2), 4)
    allowed = np.ones((2, 20), bool)
    allowed[1] = False
    allowed[1, [2, 13, 19]] = True  # answers of the second task
    share = counts / jnp.where(task == 0, counts[:4].sum(), counts[4:].sum())
    head = Head(rows, cap, chunk)

    def ours(w, z):
        return head_entropies(head, w, z, task, share, jnp.asarray(allowed))

    def plain(w, z):
        y = z @ (w.T if rows else w)
        y = y if cap is None else cap * jnp.tanh(y / cap)
        parts = y[None, :4], y[None, 4:][..., np.flatnonzero(allowed[1])]
        found = [entropy(y, counts[None, 4 * k : 4 * k + 4]) for k, y in enumerate(parts)]
        return tuple(jnp.stack(pair) for pair in zip(*found, strict=True))

    for one, other in zip(jax.jit(ours)(w, z), plain(w, z), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    weights = jnp.asarray([[1.0, 2.0], [-0.5, 3.0]])  # of the entropies and of the marginal ones

    def weighted(f):
        return lambda w, z: jnp.sum(jnp.stack(f(w, z)) * weights)

    grads = [jax.jit(jax.grad(weighted(f), (0, 1)))(w, z) for f in (ours, plain)]
    for one, other in zip(*grads, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_in_parts_is_the_whole_gradient(rng, tied):
    config = lm.ModelConfig(
        **{"vocab_size": 50, "num_layers": 1, "d_model": 16, "num_heads": 2, "d_ff": 16},
        **{"dtype": "float32", "tie_embeddings": tied, "embedding_scale": tied},
    )
    params = lm.init(config, jax.random.key(0))
    tasks = [
        Rows(n, rng.integers(0, 50, (4, 6)).astype("i4"), np.asarray([6, 3, 6, 4]), answers, False)
        for n, answers in (("a", None), ("b", np.asarray([3, 7, 11])))
    ]
    batches = [batch_of(t, 0, size=3, positions=4, seed=0, stream=k) for k, t in enumerate(tasks)]
    batch, answers = stacked(batches, 4), [t.answers for t in tasks]

    @jax.jit
    @jax.grad
    def whole(params):
        return sum(each.entropy for each in task_entropies(config, params, batch, answers))

    expected = by_path(whole(params))
    _, got = entropy_gradient(config, params, batch, answers, chunk=16)
    leaf = SimpleNamespace(leaf=SimpleNamespace(path=("embedding",)))
    models = SimpleNamespace(
        places={"e": [leaf]},
        flat=lambda tree, piece: tree["embedding",][piece.start : piece.stop].reshape(-1),
    )
    pieces = [Piece("e", start, start + 10, 16) for start in range(0, 50, 10)]

    def embedding_of(gradient):
        return np.concatenate([gradient.flat(models, p).reshape(10, 16) for p in pieces])

    if tied:  # by all logits at once nothing is apart
        _, averaged = entropy_gradient(config, params, batch, answers, average_logits=True)
        np.testing.assert_array_equal(embedding_of(averaged), averaged.tree["embedding",])
    embedding = embedding_of(got)
    for path, value in (got.tree | {("embedding",): embedding}).items():
        np.testing.assert_allclose(value, expected.pop(path), atol=1e-5, err_msg=str(path))
    assert not expected and (("embedding",) in got.tree) == tied
