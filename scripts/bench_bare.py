"""A hand-written JAX training step of the same maths as bench_train.py's model, without Aniso.

What a careful engineer writes in an afternoon: unrolled or scanned layers, fused projections or
not, [B * T, D] activations, T x T attention, whole logits. bench_train.py holds our step against
the fastest of these variants.
"""

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint


@jax.custom_vjp
def matmul(x, w):
    return x @ w.astype(x.dtype)


def _forward(x, w):
    return matmul(x, w), (x, w)


def _backward(saved, g):
    x, w = saved

    def row_major(a):
        return with_layout_constraint(a, Layout((0, 1)))

    dw = jax.lax.dot(row_major(x.T), g, preferred_element_type=jnp.float32)
    return g @ row_major(w.astype(x.dtype).T), dw.astype(w.dtype)


matmul.defvjp(_forward, _backward)


def init(shape, key):
    d, f, layers, vocab = shape["width"], shape["hidden"], shape["layers"], shape["vocab"]
    keys = iter(jax.random.split(key, 16))

    def normal(*size):
        return jax.random.normal(next(keys), size) * size[-2] ** -0.5

    return {
        "embedding": normal(vocab, d),
        "head": normal(d, vocab),
        "norm": jnp.ones(d),
        "layers": {
            "norm1": jnp.ones((layers, d)),
            "norm2": jnp.ones((layers, d)),
            **{name: normal(layers, d, d) for name in ("q", "k", "v", "o")},
            "gate": normal(layers, d, f),
            "up": normal(layers, d, f),
            "down": normal(layers, f, d),
        },
    }


def make_step(shape, dtype, *, scan, custom_gradient):
    """(init_state, step) with AdamW and clipping, as the framework's defaults have it."""
    heads, layers = shape["heads"], shape["layers"]
    dot = matmul if custom_gradient else (lambda x, w: x @ w.astype(x.dtype))
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1)
    )

    def norm(x, scale):
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-5)
        return (x32 * inverse * scale).astype(x.dtype)

    def loss_fn(params, tokens, targets):
        b, t = tokens.shape
        d = params["embedding"].shape[1]
        h = d // heads
        angles = jnp.arange(t)[:, None] * 10_000.0 ** (-jnp.arange(0, h, 2) / h)[None]
        cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
        mask = jnp.tril(jnp.ones((t, t), bool))

        def rotate(x):
            first, second = jnp.split(x.reshape(b, t, heads, h).astype(jnp.float32), 2, -1)
            turned = first * cos - second * sin, second * cos + first * sin
            return jnp.concatenate(turned, -1).astype(x.dtype)

        def block(x, p):
            y = norm(x, p["norm1"])
            q, k = rotate(dot(y, p["q"])), rotate(dot(y, p["k"]))
            v = dot(y, p["v"]).reshape(b, t, heads, h)
            scores = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(jnp.where(mask, scores * h**-0.5, -1e30), -1)
            y = jnp.einsum("bnqk,bknh->bqnh", weights.astype(x.dtype), v)
            x = x + dot(y.reshape(b * t, d), p["o"])
            y = norm(x, p["norm2"])
            y = jax.nn.silu(dot(y, p["gate"])) * dot(y, p["up"])
            return x + dot(y, p["down"]), None

        x = params["embedding"][tokens.reshape(-1)].astype(dtype)
        if scan:
            x, _ = jax.lax.scan(block, x, params["layers"])
        else:
            for i in range(layers):
                x, _ = block(x, jax.tree.map(lambda leaf: leaf[i], params["layers"]))  # noqa: B023
        logits = dot(norm(x, params["norm"]), params["head"]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets.reshape(-1)).mean()

    def init_state(key):
        params = init(shape, key)
        return params, tx.init(params)

    def step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch["tokens"], batch["targets"])
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": loss}

    return init_state, step
