"""Which routes tokens take through adapters, how mixed they are, and what forgetting they go with.

The claim of arXiv 2602.12587 that is measured here: the more compositions of factors share a route
(the higher its N_eff, `moe.effective_compositions`), the more later training raises the loss of the
old tokens that took it. Its theorem is not relied on.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import moe
from lm import model
from lm.config import AdapterConfig, ModelConfig
from lm.layers.linear import Site

BINS = 4
"""Of token frequency (equal counts of tokens) and of position in the document (equal counts)."""
MIN_TOKENS = 16
"""Routes with fewer tokens tell nothing about their loss."""


def route_report(
    config: ModelConfig, before: model.Params, after: model.Params, domains: Sequence[Sequence]
) -> dict[str, Any]:
    """N_eff of the routes that held-out tokens of learned domains take, and their forgetting.

    A token's composition is (its domain, bin of its frequency, bin of its position). Routes are
    those before, one set for each adapted projection of each layer.

    Args:
      config: the model with its adapters.
      before: parameters when the last of `domains` was learned.
      after: parameters after later domains.
      domains: (batch, bytes) pairs of each.

    Returns:
      routes: number taken, mean over projections and layers, as all that follow;
      n_eff: mean over tokens of their route's N_eff;
      n_eff_shuffled: the same with compositions dealt out at random: what finitely many tokens give
        if routes know nothing of compositions;
      coverage: share of tokens on routes with at least `MIN_TOKENS` tokens;
      correlation: Spearman's, over those routes, of N_eff and mean increase of their tokens' loss;
        where a projection has fewer than 4 such routes it is left out (None: everywhere);
      projections: how many it is the mean of.
    """
    routes_of = jax.jit(functools.partial(token_routes, config))
    losses_of = jax.jit(functools.partial(token_losses, config))
    parts: dict[str, list[np.ndarray]] = {}
    for number, batches in enumerate(domains):
        for batch, _ in batches:
            kept = np.asarray(batch["weights"]).reshape(-1) > 0
            values = {
                "domain": np.full(kept.size, number),
                "token": batch["tokens"],
                "position": batch["positions"],
                "increase": losses_of(after, batch) - losses_of(before, batch),
            }
            for name, value in values.items():
                parts.setdefault(name, []).append(np.asarray(value).reshape(-1)[kept])
            for name, value in routes_of(before, batch).items():
                for layer, rows in enumerate(np.asarray(value)):
                    parts.setdefault(f"route {name} {layer}", []).append(rows[kept])
    tokens = {name: np.concatenate(values) for name, values in parts.items()}
    labels = compositions(tokens["domain"], tokens["token"], tokens["position"])
    shuffled = np.random.default_rng(0).permutation(labels)
    found = [
        _describe(rows, labels, shuffled, tokens["increase"])
        for name, rows in tokens.items()
        if name.startswith("route ")
    ]
    correlations = [c for *_, c in found if c is not None]
    count, n_eff, dealt, coverage = (float(np.mean(v)) for v in list(zip(*found, strict=True))[:4])
    return {
        "routes": round(count, 1),
        "n_eff": round(n_eff, 4),
        "n_eff_shuffled": round(dealt, 4),
        "coverage": round(coverage, 4),
        "correlation": round(float(np.mean(correlations)), 4) if correlations else None,
        "projections": len(correlations),
    }


def compositions(domain: np.ndarray, token: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Labels in [0, domains * BINS^2) of tokens [N]."""
    frequency = np.bincount(token)[token]
    label = domain
    for factor in (frequency, position):
        edges = np.quantile(factor, np.arange(1, BINS) / BINS)
        label = label * BINS + np.searchsorted(edges, factor, side="right")
    return label


def _describe(rows, labels, shuffled, increase):
    """(routes, N_eff, N_eff of shuffled labels, coverage, correlation) of one projection."""
    ids, count = moe.route_ids(rows, ordered=True)
    width = int(labels.max()) + 1

    def n_eff(labels):
        # As many rows as tokens, whatever the number of routes: one compiled program.
        counts = np.bincount(ids * width + labels, minlength=ids.size * width)
        return moe.effective_compositions(counts.reshape(ids.size, width))

    measured = n_eff(labels)
    tokens = np.bincount(ids, minlength=count)
    enough = tokens >= MIN_TOKENS
    mean_increase = np.bincount(ids, increase, minlength=count) / np.maximum(tokens, 1)
    per_route = np.asarray(measured.per_route)[:count]
    correlation = None
    if enough.sum() >= 4:
        correlation = spearman(per_route[enough], mean_increase[enough])
    coverage = tokens[enough].sum() / ids.size
    return count, float(measured.mean), float(n_eff(shuffled).mean), coverage, correlation


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation, equal values sharing their mean rank; None if one side is constant."""
    ranks = []
    for values in (a, b):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place])
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def token_losses(config: ModelConfig, params: model.Params, batch) -> jax.Array:
    """Negative log-likelihood of every target, nats, [B, T]."""
    logits = model.apply(
        config,
        params,
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])


def token_routes(config: ModelConfig, params: model.Params, batch) -> dict[str, jax.Array]:
    """The route of every token in every adapter with a router: {projection: int32 [L, B T, R]}.

    A route is the tuple of the R experts chosen in all slices (`moe.routes`). Found by running the
    layers one by one and looking at what each projection is given.
    """
    seen: dict[str, list[jax.Array]] = {}

    def plug(site: Site):
        def product(x, w, dims):
            seen.setdefault(site.name, []).append(x)
            return jax.lax.dot_general(x, w, dims)

        return product

    config = dataclasses.replace(config, unroll=config.num_layers, remat="none")
    model.hidden(
        config,
        params,
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        plug=plug,
    )
    found = {}
    for name, inputs in seen.items():
        node = functools.reduce(lambda node, key: node[key], name.split("."), params)
        if "router" not in node.get("adapter", {}):
            continue
        layers = [
            jax.tree.map(lambda leaf, i=i: leaf[i], node["adapter"]) for i in range(len(inputs))
        ]
        found[name] = jnp.stack(
            [_routes(config.adapter, *pair) for pair in zip(layers, inputs, strict=True)]
        )
    return found


def _routes(config: AdapterConfig, adapter, x):
    params = adapter | {"router": adapter["router"]["kernel"]}
    if config.kind == "multi_head":
        _, routing = moe.multi_head_lora(x, params, heads=config.heads, k=config.top_k)
        routing = moe.Routing(*(v.reshape(x.shape[0], config.heads, -1) for v in routing))
    else:
        routing = moe.head_wise_route(x, params["router"], config.top_k)
    return moe.routes(routing)
