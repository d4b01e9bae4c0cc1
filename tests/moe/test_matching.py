import math

import jax
import jax.numpy as jnp
import pytest

import moe


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def fits(layer, width, params, **options):
    """These arrays are ones that the layer takes."""
    jax.eval_shape(lambda x, p: layer(x, p, **options), jnp.zeros((2, width)), params)


def test_published_numbers_of_qwen3_8b():
    """36 layers, three maps of 4096 <-> 12288, rank 8: 14,155,776 active adapter parameters."""
    shapes = [(4096, 12288), (4096, 12288), (12288, 4096)]
    assert 36 * sum(moe.lora_size(*shape, 8).active for shape in shapes) == 14_155_776


def test_the_formula_makes_active_parameters_equal():
    for d_in, d_out, heads, k in [(64, 64, 4, 1), (128, 384, 8, 1), (384, 128, 2, 2)]:
        rank = moe.matched_rank(d_in, d_out, 8, heads=heads, k=k)
        assert heads * k * rank * (d_in / heads + d_out) == pytest.approx(8 * (d_in + d_out))
    assert moe.matched_rank(512, 512, 1, heads=4) == pytest.approx(0.4)  # square, 4 heads
    assert moe.matched_rank(512, 100, 8) == 8  # one head is LoRA


def test_whole_ranks_make_up_for_one_another():
    shapes = [(128, 384), (128, 384), (384, 128)]
    wanted = sum(8 * (d_in + d_out) for d_in, d_out in shapes)
    for heads in (2, 4, 8):
        ranks = moe.matched_ranks(shapes, 8, heads=heads)
        spent = sum(
            heads * rank * (d_in // heads + d_out)
            for rank, (d_in, d_out) in zip(ranks, shapes, strict=True)
        )
        assert abs(spent / wanted - 1) < 0.07, (heads, ranks)
    # Rounded one by one, 1.28 + 1.28 + 2.91 would be 1 + 1 + 3; the second makes up for the first.
    assert moe.matched_ranks(shapes, 8, heads=8) == [1, 2, 2]
    assert moe.matched_ranks([(16, 16)], 1, heads=8) == [1]
    with pytest.raises(ValueError, match="width 10"):
        moe.matched_ranks([(10, 10)], 8, heads=4)


@pytest.mark.parametrize("heads,experts,k", [(1, 4, 1), (1, 26, 5), (4, 4, 2)])
def test_lora_sizes_are_those_of_the_arrays(heads, experts, k):
    d_in, d_out, r = 16, 24, 3
    params = {
        "router": jnp.zeros((heads, d_in // heads, experts)),
        "lora_a": jnp.zeros((heads, experts, d_in // heads, r)),
        "lora_b": jnp.zeros((heads, experts, r, d_out)),
    }
    fits(moe.head_wise_lora, d_in, params, k=k)
    size = moe.lora_size(d_in, d_out, r, heads=heads, experts=experts, k=k)
    assert size.total == count(params)
    one = count({n: params[n][:, :k] for n in ("lora_a", "lora_b")})
    assert size.active == one + count(params["router"])


def test_sizes_of_whole_layers_are_those_of_the_arrays():
    d, f, heads, experts, k = 12, 10, 3, 4, 2
    head_wise = {
        "router": jnp.zeros((heads, d // heads, experts)),
        "gate": jnp.zeros((heads, experts, d // heads, f)),
        "up": jnp.zeros((heads, experts, d // heads, f)),
        "down": jnp.zeros((heads, experts, f, d)),
    }
    fits(moe.head_wise_mlp, d, head_wise, k=k)
    size = moe.head_wise_mlp_size(d, f, heads=heads, experts=experts, k=k)
    assert size.total == count(head_wise)
    banks = {n: v[:, :k] for n, v in head_wise.items() if n != "router"}
    assert size.active == count(banks) + count(head_wise["router"])
    multi_head = {
        "head": jnp.zeros((d, d)),
        "merge": jnp.zeros((d, d)),
        "router": jnp.zeros((d // heads, experts)),
        "gate": jnp.zeros((experts, d // heads, f)),
        "up": jnp.zeros((experts, d // heads, f)),
        "down": jnp.zeros((experts, f, d // heads)),
    }
    fits(moe.multi_head_mlp, d, multi_head, heads=heads, k=k)
    size = moe.multi_head_mlp_size(d, f, heads=heads, experts=experts, k=k)
    assert size.total == count(multi_head)
    # Every part of a token meets the router and k experts.
    pool = {n: v[:k] for n, v in multi_head.items() if n in ("gate", "up", "down")}
    assert size.active == 2 * d * d + heads * (count(multi_head["router"]) + count(pool))


def test_the_plain_mixture_is_matched_in_parameters_and_flops():
    d, f, experts, k, heads = 768, 2048, 8, 2, 4
    plain = moe.mlp_experts_size(d, f, experts=experts, k=k)
    width = moe.matched_head_wise_width(d, f, k_plain=k, heads=heads, k=k)
    assert width == pytest.approx(3 * f / (2 + heads))
    ours = moe.head_wise_mlp_size(d, round(width), heads=heads, experts=experts // k, k=k)
    assert ours.active / plain.active == pytest.approx(1, abs=5e-3)
    width, many = moe.matched_multi_head(d, f, experts, heads=heads, k=k)
    assert width == pytest.approx(f - 2 * d / (3 * k))
    ours = moe.multi_head_mlp_size(d, round(width), heads=heads, experts=round(many), k=k)
    assert ours.active / plain.active == pytest.approx(1, abs=5e-3)
    assert ours.total / plain.total == pytest.approx(1, abs=0.5 / math.floor(many))
    with pytest.raises(ValueError, match="raise d_ff above 512"):
        moe.matched_multi_head(768, 512, 8, heads=4, k=1)


def test_counted_flops_follow_the_active_parameters():
    """XLA's own count of the dense form of one expert per bank: 2 a parameter and token."""
    n, d_in, d_out, r, heads = 32, 64, 96, 2, 4
    params = {
        "router": jnp.zeros((heads, d_in // heads, 1)),
        "lora_a": jnp.zeros((heads, 1, d_in // heads, r)),
        "lora_b": jnp.zeros((heads, 1, r, d_out)),
    }
    run = jax.jit(lambda x, p: moe.head_wise_lora(x, p)[0])
    flops = run.lower(jnp.zeros((n, d_in)), params).compile().cost_analysis()["flops"]
    active = moe.lora_size(d_in, d_out, r, heads=heads).active
    assert 2 * n * active <= flops <= 1.2 * 2 * n * active
