"""What the compiled model costs: memory by remat policy, program size by depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm
from lm.config import ModelConfig
from lm.model import REMAT_POLICIES

SIZES = dict(vocab_size=64, num_layers=6, d_model=32, num_heads=2, d_ff=96, dtype="float32")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 64)))


def gradient(**changes):
    config = ModelConfig(**SIZES | changes)
    params = jax.jit(lm.init, static_argnums=0)(config, jax.random.key(0))

    def loss(params):
        return jnp.square(lm.apply(config, params, TOKENS)).mean()

    return jax.value_and_grad(loss), params


def compiled(**changes):
    function, params = gradient(**changes)
    # Buffers are assigned before LLVM, whose optimizations are most of the compile time.
    options = {"xla_backend_optimization_level": 0}
    program = jax.jit(function).lower(params).compile(compiler_options=options)
    return program.memory_analysis().temp_size_in_bytes, program(params)


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), a, b)


@pytest.mark.slow
def test_policies_give_the_same_gradients_for_less_memory():
    memory, results = {}, {}
    for name in REMAT_POLICIES:
        memory[name], results[name] = compiled(remat=name)
        assert_close(results[name], results["none"])
    assert memory["full"] < memory["attention"] < memory["dots"] < memory["none"], memory
    assert memory["full"] < 0.5 * memory["none"], memory


def test_layers_beyond_the_last_whole_period_are_rematerialized_too():
    pattern = dict(num_layers=3, sliding_window=8, attention_pattern=("full",) * 3 + ("sliding",))
    plain, expected = compiled(**pattern)
    memory, result = compiled(**pattern, remat="full")
    assert_close(result, expected)
    assert memory < 0.7 * plain, (memory, plain)


def test_attention_outputs_are_kept_once():
    function, params = gradient(remat="attention")
    (forward, *_) = [
        eqn for eqn in jax.make_jaxpr(function)(params).eqns if eqn.primitive.name == "scan"
    ]
    shapes = [v.aval.shape for v in forward.outvars]
    assert shapes.count((6, 4, 64, 2, 16)) == 1, shapes


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("pattern", [(), ("sliding", "full")])
def test_program_size_does_not_grow_with_depth(remat, pattern):
    window = 8 if pattern else None
    lines = []
    for layers in (4, 16):
        function, params = gradient(
            num_layers=layers, remat=remat, attention_pattern=pattern, sliding_window=window
        )
        lines.append(jax.jit(function).lower(params).as_text().count("\n"))
    assert lines[0] == lines[1]
