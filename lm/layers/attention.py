"""Attention behind one function: implementations by name, or the best one for the device.

    out_t = sum_s softmax_s(scale q_t . k_s) v_s,   s over the keys that t may see

"reference"  T x S scores in float32; what the tests of the others start from
"dense"      XLA, short rows: query blocks, causal products skipped (attention_dense.py)
"blocked"    XLA, long rows: memory grows as T + S (attention_blocked.py)
"xla"        "dense" or "blocked", by the lengths
"cudnn"      cuDNN through `jax.nn.dot_product_attention`; 16-bit, no segment ids
"tokamax"    kernels of the tokamax library on GPU and TPU; 16-bit
"""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lm.layers.attention_blocked import blocked
from lm.layers.attention_common import CHECKPOINT_NAME, Spec, gather, places, visible
from lm.layers.attention_dense import dense

DENSE_LIMIT = 512 * 512
"""Largest T x S for which "xla" means "dense"."""


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention: query head n attends with key/value head n // (N / K).

    Query t sees key s if all of these hold: s <= t (causal; both are indices in the row);
    s > t - window; and the segment ids of t and s are equal. Softmax is taken in float32; float32
    operands are multiplied in float32. A query that sees no key gives zeros, as do its gradients.

    Args:
      q, k, v: queries, keys, values of one dtype; N must be a multiple of K.
      segment_ids: document of each query, int32; padding is a document too (0 by convention).
      kv_segment_ids: document of each key; defaults to `segment_ids`, which then needs T == S.
      causal: hide the keys after a query.
      window: a query sees itself and the window - 1 keys before it; needs `causal`.
      scale: factor on the scores; default H ** -0.5.
      soft_cap: scores s become soft_cap * tanh(s / soft_cap) (Gemma 2, arXiv 2408.00118).
      implementation: a name of the table above. None takes a library kernel where one is sure to
        apply, else "xla". cuDNN is not told of segment ids (it could only be given them as a bias
        of T x S), so packed rows on a GPU without tokamax run in XLA, which is slower.

    Raises:
      ValueError: shapes or arguments that do not fit, or an unknown name.
      NotImplementedError: the named implementation cannot do this on this device. It never hands
        over to another one.
    """
    _check(q, k, v, segment_ids, kv_segment_ids, causal, window)
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    spec = Spec(scale, causal, window, soft_cap)
    if implementation is None:
        implementation = _choose(q, segment_ids) if soft_cap is None else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown attention implementation {implementation!r}; "
            f"there are {', '.join(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[implementation](spec, q, k, v, segment_ids, kv_segment_ids)


def _check(q, k, v, segment_ids, kv_segment_ids, causal, window):
    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape:
        raise ValueError(
            f"q must be [B, T, N, H], k and v [B, S, K, H]; got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {q.shape} and k {k.shape} must agree in B and H, and N must be a multiple of K"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share a dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if window is not None and (not causal or window < 1):
        raise ValueError(f"window must be 1 or more and needs causal=True; got window={window}")
    if kv_segment_ids is not None and segment_ids is None:
        raise ValueError("kv_segment_ids without segment_ids: give both")
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    for name, ids, x in (("segment_ids", segment_ids, q), ("kv_segment_ids", kv_segment_ids, k)):
        if ids is not None and ids.shape != x.shape[:2]:
            raise ValueError(f"{name} must be {x.shape[:2]}, one id per token; got {ids.shape}")


def _choose(q: Array, segment_ids: Array | None) -> str:
    # Library kernels are opaque to the partitioner; only cuDNN brings its own partitioning rule.
    # Under a mesh they run in the shard_map of attention_context.py, if asked for by name.
    backend = jax.default_backend()
    sixteen_bit = q.dtype in (jnp.bfloat16, jnp.float16)
    if backend == "cpu" or not sixteen_bit or q.shape[-1] not in (64, 128):
        return "xla"
    if jax.device_count() == 1 and importlib.util.find_spec("tokamax"):
        return "tokamax"
    if backend == "gpu" and segment_ids is None and q.shape[1] % 2 == 0:
        return "cudnn"
    return "xla"


def reference(spec: Spec, q, k, v, q_segments, kv_segments) -> Array:
    """The definition, in float32, differentiated by JAX."""
    group = q.shape[2] // k.shape[2]
    k, v = gather(spec, k, v)
    k, v = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (k, v))
    precision = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k, precision=precision)
    scores = scores * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    indices = places(spec, q.shape[1], k.shape[1])
    mask = visible(spec, *indices, q_segments, kv_segments)
    if mask is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        # A finite fill keeps the softmax and its gradient finite where a row is masked as a whole.
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
        weights = jnp.where(mask[:, None], weights, 0)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v, precision=precision)
    return checkpoint_name(out.astype(q.dtype), CHECKPOINT_NAME)


def xla(spec: Spec, q, k, v, q_segments, kv_segments) -> Array:
    """Runs "dense" while its T x S temporaries are small, "blocked" beyond."""
    area = q.shape[1] * k.shape[1] * spec.context
    run = dense if area <= DENSE_LIMIT else blocked
    return run(spec, q, k, v, q_segments, kv_segments)


def _require_kernel(name: str, backends: tuple[str, ...], q: Array, spec: Spec) -> None:
    if jax.default_backend() not in backends:
        raise NotImplementedError(
            f"attention implementation {name!r} needs {' or '.join(backends)}, "
            f"this is {jax.default_backend()}: use None or 'xla'"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"attention implementation {name!r} multiplies in 16 bit, q is {q.dtype}: use 'xla'"
        )
    if spec.soft_cap is not None:
        raise NotImplementedError(
            f"attention implementation {name!r} is not given a soft cap here: use 'xla'"
        )


def cudnn(spec: Spec, q, k, v, q_segments, kv_segments) -> Array:
    """cuDNN's flash attention. It has no segment ids, so it refuses them instead of leaking."""
    if q_segments is not None or kv_segments is not None:
        raise NotImplementedError(
            "attention implementation 'cudnn' has no segment ids and would let packed documents "
            "see each other: use 'xla' or 'tokamax'"
        )
    _require_kernel("cudnn", ("gpu",), q, spec)
    window = None if spec.window is None else (spec.window - 1, 0)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=spec.scale,
        is_causal=spec.causal,
        local_window_size=window,
        implementation="cudnn",
    )
    return checkpoint_name(out, CHECKPOINT_NAME)


def tokamax(spec: Spec, q, k, v, q_segments, kv_segments) -> Array:
    """tokamax.dot_product_attention with its GPU or TPU kernels, segments as a boolean mask.

    The mask is [B, 1, T, S], one byte an entry, shared by the heads. tokamax's own XLA forms are
    left out, so shapes that no kernel takes raise instead of holding T x S scores.
    """
    _require_kernel("tokamax", ("gpu", "tpu"), q, spec)
    if importlib.util.find_spec("tokamax") is None:
        raise NotImplementedError(
            "attention implementation 'tokamax' needs the tokamax package: "
            "pip install 'aniso[kernels]'"
        )
    import tokamax as library

    mask = None
    if q_segments is not None:
        mask = q_segments[:, None, :, None] == kv_segments[:, None, None, :]
    window = None if spec.window is None else (spec.window - 1, 0)
    kernels = ("mosaic", "triton") if jax.default_backend() == "gpu" else ("mosaic",)
    try:
        out = library.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            scale=spec.scale,
            is_causal=spec.causal,
            local_window_size=window,
            implementation=kernels,
        )
    except ExceptionGroup as group:
        raise NotImplementedError(
            f"no tokamax attention kernel takes q {q.shape}, k {k.shape}, {q.dtype} here: "
            f"{'; '.join(str(e) for e in group.exceptions)}"
        ) from group
    return checkpoint_name(out, CHECKPOINT_NAME)


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "reference": reference,
    "dense": dense,
    "blocked": blocked,
    "xla": xla,
    "cudnn": cudnn,
    "tokamax": tokamax,
}
