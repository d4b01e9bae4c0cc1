"""Quantized products in training: from `QuantConfig` to a `Plug` for every step.

A plug holds what one step needs: the key of the step for stochastic rounding, the bases that some
recipes keep between steps, and, when measuring, a place for the numbers. Bases and numbers leave
the backward pass as gradients of those arguments (see `quant.dot_general`).
"""

import dataclasses
import difflib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import moe
import quant
from lm import model
from lm.config import ConfigError
from lm.layers.linear import Plug, Site
from lm.train.config import RunConfig

Bases = dict[str, quant.Bases]
"""By the name of a site, stacked over layers."""


EXPERTS = "layers.mlp.experts"
"""Site of the grouped products of routed experts (`lm.layers.moe`)."""


class ExpertProducts(NamedTuple):
    """What an expert layer asks of a plug."""

    grouped: dict[str, quant.Grouped]
    """By matrix: "gate", "up", "down"."""
    align: int
    """Every expert's rows begin at a multiple of this."""


class Quantization:
    """The quantized products of a run."""

    def __init__(self, config: RunConfig):
        """Raises ConfigError for an unknown recipe or what the run cannot combine."""
        if config.quant.recipe not in quant.RECIPES:
            known = ["none", *quant.RECIPES]
            near = difflib.get_close_matches(config.quant.recipe, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"quant.recipe must be one of {', '.join(known)}, got {config.quant.recipe!r}{hint}"
            )
        recipe = quant.get_recipe(config.quant.recipe)
        try:
            self.rules = quant.Rules(
                config.quant.high, config.quant.keep_first, config.quant.keep_last
            )
        except ValueError as error:
            raise ConfigError(f"quant: {error}") from error
        if config.quant.refresh:
            if recipe.low_rank is None:
                raise ConfigError(
                    f"quant.refresh is {config.quant.refresh}, but recipe {recipe.name} has no "
                    "bases to renew: leave it at 0"
                )
            low_rank = dataclasses.replace(recipe.low_rank, refresh=config.quant.refresh)
            recipe = dataclasses.replace(recipe, low_rank=low_rank)
        if recipe.needs_state and config.optim.tasks:
            raise ConfigError(
                "optim.name adatask has one backward pass for each source, which would each renew "
                "the bases of the quantization: set --quant.refresh 1"
            )
        self.recipe = recipe
        self._config = config

    def init(self) -> Bases:
        """Empty bases; {} if the recipe keeps none."""
        if not self.recipe.needs_state:
            return {}
        tokens = self._tokens
        bases = {
            name: quant.init_state(self.recipe, tokens, *shape)
            for name, shape in self.sites().items()
            if name.startswith("layers.")
        }
        count = self._config.model.num_layers
        stack = lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype)  # noqa: E731
        return {name: jax.tree.map(stack, b) for name, b in bases.items() if b}

    def probes(self) -> dict[str, jax.Array]:
        """Zeros to be differentiated with respect to: a row of `quant.NAMES` for each layer."""
        count, width = self._config.model.num_layers, len(quant.NAMES)
        return {
            name: jnp.zeros((count, width), jnp.float32)
            for name in self.sites()
            if name.startswith("layers.")
        }

    @property
    def _tokens(self) -> int:
        config = self._config
        return config.batch_size // config.micro_batches * config.sequence_length

    def sites(self) -> dict[str, tuple[int, int]]:
        """Name and weight shape of every product that the rules leave to be quantized."""
        found: dict[str, tuple[int, int]] = {}

        def record(site: Site):
            def dot_general(x, w, dims, **_):
                found[site.name] = w.shape
                return jax.lax.dot_general(x, w, dims)

            known = self.rules.quantized(site.name) and site.name != EXPERTS
            return dot_general if known else None

        config = self._config
        shape = config.batch_size // config.micro_batches, config.sequence_length
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
        params = model.abstract_params(config.model)
        jax.eval_shape(
            lambda params, tokens: model.hidden(config.model, params, tokens, plug=record),
            params,
            tokens,
        )
        return found

    def at(
        self,
        step: jax.Array | int,
        micro: jax.Array | int = 0,
        *,
        bases: Bases | None = None,
        probes: dict[str, jax.Array] | None = None,
    ) -> Plug:
        """The products of one step.

        Args:
          step: number of the step; with the seed and the site it makes the key.
          micro: number of the micro-batch.
          bases: those kept, stacked over layers.
          probes: from `probes`, to be differentiated.
        """
        config = self._config
        seed = quant.fold_seed(jax.random.key(config.seed), step, micro)
        blocks = config.model.num_layers

        def plug(site: Site):
            enabled = self.rules.quantized(site.name, site.layer, blocks)
            if enabled is False:
                return None
            layer = 0 if site.layer is None else site.layer
            key = quant.fold_seed(seed, site.name, layer)
            if site.name == EXPERTS:
                return self._experts(key, enabled)
            mine = lambda tree: jax.tree.map(lambda leaf: leaf[layer], tree)  # noqa: E731
            state = mine(bases[site.name]) if bases and site.name in bases else None
            return quant.dot_general(
                self.recipe,
                key=key,
                state=state,
                step=step,
                enabled=enabled,
                probe=probes[site.name][layer] if probes and site.name in probes else None,
            )

        return plug

    def _experts(self, key: quant.Seed, enabled) -> "ExpertProducts":
        options = dict(implementation=self._config.model.moe.implementation)
        products = {
            name: quant.grouped_matmul(
                self.recipe,
                functools.partial(moe.grouped_matmul, **options),
                functools.partial(moe.grouped_outer, **options),
                key=quant.fold_seed(key, name),
                enabled=enabled,
            )
            for name in ("gate", "up", "down")
        }
        return ExpertProducts(products, quant.row_multiple(self.recipe))

    def for_evaluation(self) -> Plug | None:
        """The products of an evaluation, the same at every one; None for high precision."""
        return self.at(0) if self._config.quant.evaluate == "quantized" else None


def make_quantization(config: RunConfig) -> Quantization | None:
    """The quantization that `config.quant` asks for; None multiplies in model.dtype."""
    return None if config.quant.recipe == "none" else Quantization(config)


Products = Plug | Quantization | None
"""What a training step multiplies with: always the same, or another plug at each step."""


def plug_at(products: Products, *args: Any, **kwargs: Any) -> Plug | None:
    """The plug of a step; arguments as in `Quantization.at`."""
    return products.at(*args, **kwargs) if isinstance(products, Quantization) else products
