"""Which parameters a matrix optimizer takes: a rule on names and shapes, for any JAX code."""

import re
from typing import Any

import jax
import jax.numpy as jnp

OTHERS = (
    "embed", "embedding", "embeddings", "embedder", "wte", "wpe",
    "head", "lmhead", "unembed", "unembedding", "logits", "classifier",
    "router", "norm", "layernorm", "rmsnorm", "groupnorm", "batchnorm", "ln", "scale", "bias",
)  # fmt: skip
"""Words that tell a parameter which is no hidden matrix. A name on the path counts if it is one of
them or has one as its first or last part ("token_embedding", "ln_1", "attention_norm", "lm_head");
names joined by dots or slashes ("model.embed_tokens.weight") count one by one;
"head" counts only alone or behind "lm", "output" or "classification", since "head" and "heads"
also name parts of attention. "gate" is a router right below a name with "moe" in it
("block_sparse_moe.gate"), and elsewhere half of a gated MLP."""

_HEADS = re.compile(r"^(lm|output|classification|mlm|vocab)_?head$|^head$")


def matrix_labels(params: Any, matrix: str = "matrix", other: str = "other") -> Any:
    """Labels for `optax.partition`: `matrix` for hidden matrices, `other` for all the rest.

    A hidden matrix is real, has two axes or more, both of the last two longer than 1, and no word
    of `optim.labels.OTHERS` on its path. Names decide because shapes cannot: a stack of norms or
    biases over layers has two axes as well. Which axes are the matrix is not looked at.

    Args:
      params: any tree; names are those of dictionaries, attributes, dataclasses and NNX or Equinox
        modules. A parameter on an unnamed path goes by its shape alone.
      matrix: label of hidden matrices.
      other: label of embeddings, heads, norms, biases, routers, vectors and scalars.

    Returns:
      A tree of strings with the structure of `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> w, b = jnp.ones((8, 8)), jnp.ones((3, 8))
      >>> matrix_labels({"embed": w, "mlp": {"kernel": w, "bias": b}, "final_norm": b})
      {'embed': 'other', 'final_norm': 'other', 'mlp': {'bias': 'other', 'kernel': 'matrix'}}
    """

    def label(path, leaf):
        shape, dtype = jnp.shape(leaf), getattr(leaf, "dtype", jnp.float32)
        hidden = len(shape) >= 2 and min(shape[-2:]) > 1 and jnp.issubdtype(dtype, jnp.floating)
        names = _names(path)
        named = any(_other(name) for name in names) or any(map(_router, names, names[1:]))
        return matrix if hidden and not named else other

    return jax.tree_util.tree_map_with_path(label, params)


def _names(path) -> list[str]:
    names = []
    for entry in path:
        name = getattr(entry, "key", getattr(entry, "name", None))
        names += re.split(r"[./]", name) if isinstance(name, str) else []
    return names


def _router(above: str, name: str) -> bool:
    return name == "gate" and "moe" in above.lower()


def _other(name: str) -> bool:
    # CamelCase (LayerNorm_0, lmHead) becomes snake_case.
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")
    name = re.sub(r"_?\d+$", "", name)
    if _HEADS.match(name):
        return True
    parts = [part for part in re.split(r"[_\-]", name) if part]
    ends = {name.replace("_", ""), *(parts[:1] + parts[-1:])}
    return bool(ends & (set(OTHERS) - {"head"}))
