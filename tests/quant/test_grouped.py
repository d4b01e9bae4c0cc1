"""Grouped products: one group is the ordinary product, several are as many; trained factors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe
import quant

DIMS = (((1,), (0,)), ((), ()))


def tensors(experts, rows=32, k=64, n=48):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (experts * rows, k)) + jax.random.normal(keys[3], (1, k))
    w = jax.random.normal(keys[1], (experts, k, n))
    return x, w, jax.random.normal(keys[2], (experts * rows, n)), jnp.full(experts, rows)


def grouped(name, **options):
    return quant.grouped_matmul(name, moe.grouped_matmul, moe.grouped_outer, **options)


def with_gradients(f, x, w, d):
    y, back = jax.vjp(f, x, w)
    return (y, *back(d))


def close(a, b, tolerance):
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_one_group_is_the_ordinary_product(name):
    x, w, d, sizes = tensors(1)
    got = with_gradients(lambda x, w: grouped(name)(x, w, sizes), x, w, d)
    plain = quant.dot_general(name)
    wanted = with_gradients(lambda x, w: plain(x, w[0], DIMS), x, w, d)
    for a, b in zip(got, wanted, strict=True):
        close(np.asarray(a), np.asarray(b), 1e-6)


def nearest(name, **mean):
    """A recipe without random roundings, so that keys do not matter."""
    recipe = quant.get_recipe(name)
    operands = {
        role: dataclasses.replace(operand, rounding="nearest", sr_headroom=None)
        for role, operand in recipe.operands.items()
    }
    if mean:
        operands["mean"] = dataclasses.replace(recipe.mean, **mean)
    return dataclasses.replace(recipe, **operands)


@pytest.mark.parametrize(
    "recipe",
    [
        nearest("nvidia"),
        nearest("mean_paper"),
        nearest("mean_hadamard"),
        nearest("mean_hadamard", cross_terms=True),
        nearest("mean_hadamard", d=False),
        nearest("mean", x=False, weight="quantized"),
    ],
    ids=lambda recipe: recipe.name,
)
def test_means_and_transforms_are_those_of_the_ordinary_product(recipe):
    x, w, d, sizes = tensors(1)
    d = d + 2.0  # a mean to take out
    key = jax.random.key(1)
    got = with_gradients(lambda x, w: grouped(recipe, key=key)(x, w, sizes), x, w, d)
    plain = quant.dot_general(recipe, key=key)
    wanted = with_gradients(lambda x, w: plain(x, w[0], DIMS), x, w, d)
    for a, b in zip(got, wanted, strict=True):
        close(np.asarray(a), np.asarray(b), 1e-5)


def test_means_are_those_of_an_experts_own_rows():
    x, w, _, sizes = tensors(2)
    x = x.at[:32].add(30.0)
    y = grouped("mean", key=jax.random.key(1))(x, w, sizes)
    product = quant.dot_general("mean", key=jax.random.key(1))
    alone = [product(x[at : at + 32], w[i], DIMS) for i, at in enumerate((0, 32))]
    close(np.asarray(y), np.concatenate(alone), 0.02)


def test_groups_begin_at_blocks_and_keys_are_asked_for():
    assert [quant.row_multiple(name) for name in ("nvidia", "mxfp4", "fp8")] == [16, 32, 1]
    with pytest.raises(ValueError, match="draws random numbers"):
        grouped("nvidia")


def test_weights_are_split_and_merged():
    w = jax.random.normal(jax.random.key(0), (3, 128, 96))
    parts = quant.split_weights(w, quant.LowRank(rank=0.05), jax.random.key(1))
    assert parts.u.shape == (3, 128, 5) and parts.v.shape == (3, 96, 5)
    np.testing.assert_allclose(quant.merge_weights(parts), w, atol=1e-4)
    for basis in (parts.u, parts.v):
        gram = np.einsum("lmi,lmj->lij", basis, basis)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(5), gram.shape), atol=1e-4)
    small = w[:, :32]
    assert quant.split_weights(small, quant.LowRank(), jax.random.key(1)) is small
