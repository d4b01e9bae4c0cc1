"""Modular adaptive training in the training run: modules, refresh, flags for the model, counts.

`optim.mat` freezes what is inactive; here is what it needs to know of the language model, and the
refresh that the loop calls between steps. The choice lives in the optimizer's state, so a
checkpoint holds it, and a refresh is a pure function of the state, the seed and the step.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optim
from lm import model
from lm.config import ConfigError, ModelConfig
from lm.data import to_global
from lm.layers.skip import bucket_sizes
from lm.sharding import replicated
from lm.train.config import RunConfig
from lm.train.flops import MLP_MATRICES, mean_keys
from lm.train.guard import GuardState
from lm.train.optimizer import make_optimizer, over_experts
from lm.train.quantization import Products, plug_at
from lm.train.state import TrainState


def make_run_optimizer(
    config: RunConfig, schedule: optax.Schedule | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """`make_optimizer` of a run's configuration, around decomposed experts where there are any.

    optim.name mat wraps that of mat.base.
    """
    if config.optim.name != "mat":
        tx, schedule = make_optimizer(config.optim, config.steps, schedule)
        return over_experts(config, tx), schedule
    if config.mat.base in ("mat", "adatask"):
        raise ConfigError(f"mat.base cannot be {config.mat.base}: name another optimizer")
    base = dataclasses.replace(config.optim, name=config.mat.base)
    tx, schedule = make_optimizer(base, config.steps, schedule)
    return optim.mat(tx, modules(config)), schedule


def modules(config: RunConfig) -> Any:
    """The tree of `optim.Modules` of a run's family (`lm.train.config_mat.MatConfig.family`)."""
    layers, groups = config.model.num_layers, config.model.num_kv_heads
    if config.model.moe.dense_layers:
        raise ConfigError(
            "optim.name mat takes layers that are all alike: leave out model.moe.dense_layers"
        )
    if config.mat.family == "heads" and config.model.attention_kind == "mla":
        raise ConfigError(
            "heads of latent attention share a key and cannot be left out one by one: set "
            "mat.family to layers"
        )

    def branch(path, leaf):
        names = [entry.key for entry in path]
        if names[0] != "layers":
            return None
        kind = names[1].removesuffix("_norm")
        return optim.Modules(kind, ((0, layers),))

    def heads(path, leaf):
        names = [entry.key for entry in path]
        if names[:2] != ["layers", "attention"] or names[2].endswith("_norm"):
            return None
        if names[2] == "out":
            # The bias is added once, whatever the heads do.
            axis = 1 if names[3] == "kernel" else None
        else:
            axis = leaf.ndim - 1
        return None if axis is None else optim.Modules("heads", ((0, layers), (axis, groups)))

    label = branch if config.mat.family == "layers" else heads
    return optim.label_modules(label, model.abstract_params(config.model))


def branch_flags(config: RunConfig, opt_state: Any) -> dict[str, jax.Array] | None:
    """What `lm.model.hidden` is to back-propagate; None is everything, by the ordinary program."""
    if config.optim.name != "mat" or config.mat.skip != "branch":
        return None
    return opt_state.active


def step_metrics(config: RunConfig, opt_state: Any) -> dict[str, jax.Array]:
    """Share of modules that were active in a step, and of its FLOPs that were spent."""
    if config.optim.name != "mat":
        return {}
    flags = opt_state.active.values()
    active = sum(jnp.sum(x, dtype=jnp.float32) for x in flags) / sum(x.size for x in flags)
    share = flops_share(config, branch_flags(config, opt_state))
    return {"mat/active": active} | ({} if share is None else {"mat/flops": share})


def flops_share(config: RunConfig, active: dict[str, Any] | None) -> jax.Array | None:
    """FLOPs of a step in which only the active branches are back-propagated, over a full step's.

    Counted are products alone (`lm.train.flops`): 1 for forward, 1 for input and 1 for weight
    gradients. A set of active heads pays for its bucket (`lm.layers.skip.HEAD_BUCKETS`) and for
    computing its attention once more. None for expert layers and latent attention, whose products
    are not known here.
    """
    if config.model.mlp not in MLP_MATRICES or config.model.attention_kind == "mla":
        return None
    if active is None:
        return jnp.ones((), jnp.float32)
    projections, scores, mlp, head = _forward_flops(config.model, config.sequence_length)
    full = 3 * (np.sum(scores) + config.model.num_layers * (projections + mlp) + head)
    saved = jnp.zeros((), jnp.float32)
    attention = jnp.asarray(projections + scores, jnp.float32)
    if "heads" in active:
        groups = config.model.num_kv_heads
        sizes = jnp.array(bucket_sizes(groups))
        counts = jnp.sum(active["heads"], axis=1)
        share = sizes[jnp.searchsorted(sizes, counts)].astype(jnp.float32) / groups
        saved += jnp.sum(2 * attention * (1 - share) - jnp.asarray(scores, jnp.float32) * share)
    else:
        saved += jnp.sum(2 * attention * ~active["attention"])
        saved += 2 * mlp * jnp.sum(~active["mlp"])
    return 1 - saved / full


def _forward_flops(config: ModelConfig, length: int):
    """Per token: projections of one layer, scores [L], MLP of one layer, head."""
    d, width = config.d_model, config.head_dim
    projections = 4 * d * width * (config.num_heads + config.num_kv_heads)
    windows = config.windows
    keys = [mean_keys(length, windows[i % len(windows)]) for i in range(config.num_layers)]
    scores = 4 * config.num_heads * width * np.array(keys)
    mlp = 2 * MLP_MATRICES[config.mlp] * d * config.d_ff
    return projections, scores, mlp, 2 * d * config.vocab_size


class Refresher:
    """Chooses the active modules anew between steps; does nothing for other optimizers."""

    def __init__(self, config: RunConfig, loader: Any, mesh: Any, products: Products = None):
        self._config, self._mat = config, config.mat
        self._loader, self._sharding = loader, replicated(mesh)
        self._compiled = None
        refresh = make_refresh(config, products)

        def run(params, policy, guard, probes, step):
            new, metrics = refresh(params, policy, probes, step)
            return new, forget_norms(config, guard, policy.active, new.active), metrics

        self._refresh = jax.jit(run, out_shardings=self._sharding)

    def due(self, step: int) -> bool:
        """Whether the choice is made anew before step `step` (0, 1, ...)."""
        behind = step - self._mat.start
        return self._config.optim.name == "mat" and behind >= 0 and behind % self._mat.every == 0

    def probes(self, step: int) -> dict[str, jax.Array]:
        """Training sequences: the first rows of the batch of this step, and on from there."""
        rows, size = self._mat.probes, self._config.batch_size

        def make(span: slice):
            whole = range(rows)[span]
            parts = []
            for batch in range(whole.start // size, (whole.stop - 1) // size + 1):
                first = max(whole.start - batch * size, 0)
                last = min(whole.stop - batch * size, size)
                parts.append(self._loader.batch(step + batch, slice(first, last)))
            names = ("tokens", "segment_ids", "positions")
            return {name: np.concatenate([part[name] for part in parts]) for name in names}

        return to_global(make, self._sharding, rows)

    def prepare(self, state: TrainState) -> None:
        """Compile, so that the first refresh costs what the others do."""
        if self._config.optim.name == "mat":
            self._compiled = self._refresh.lower(*self._arguments(state, 0)).compile()

    def _arguments(self, state: TrainState, step: int):
        policy = state.opt_state._replace(inner_state=())
        number = jax.device_put(np.int32(step), self._sharding)
        return state.params, policy, state.guard, self.probes(step), number

    def refresh(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, jax.Array]]:
        """The state with a new choice, and what the metrics say of it."""
        run = self._compiled or self._refresh
        policy, guard, metrics = run(*self._arguments(state, step))
        opt_state = policy._replace(inner_state=state.opt_state.inner_state)
        return dataclasses.replace(state, opt_state=opt_state, guard=guard), metrics


def forget_norms(config: RunConfig, guard: GuardState, before: dict, after: dict) -> GuardState:
    """The spike guard's statistics start over when a module is back-propagated again.

    Its gradient adds to the norm; against the norms of fewer modules it would look like a spike,
    step after step, until the run gave up.
    """
    entered = [jnp.any(after[kind] & ~before[kind]) for kind in after]
    restart = jnp.any(jnp.stack(entered)) & (config.mat.skip == "branch")
    return guard._replace(accepted=jnp.where(restart, 0, guard.accepted))


def make_refresh(config: RunConfig, products: Products = None):
    """The pure function (params, MatState, probes, step) -> (MatState, metrics)."""
    mat = config.mat

    def output(plug, params, probe):
        tokens, segment_ids, positions = (
            probe[name][None] for name in ("tokens", "segment_ids", "positions")
        )
        x, _ = model.hidden(
            config.model, params, tokens, segment_ids=segment_ids, positions=positions, plug=plug
        )
        logits = model.logits(config.model, params, x, plug)[0]
        if mat.output == "sum":
            return optim.logit_sum(logits)
        return optim.logit_projection(logits, jax.random.key(config.seed))

    def refresh(params, state, probes, step):
        at_step = functools.partial(output, plug_at(products, step))
        grams = optim.modular_ntk(at_step, params, probes, modules(config), chunk=mat.chunk)
        values = optim.principal_eigenvalues(grams)
        key = None
        if mat.rule == "random":
            key = jax.random.fold_in(jax.random.key(config.seed), step)
        state = optim.mat_refresh(
            state,
            values,
            alpha=mat.alpha,
            target_active=mat.target_active,
            beta=mat.beta,
            random_key=key,
        )
        metrics = {f"mat/eigenvalue/{kind}": value for kind, value in values.items()}
        for name, flags in (("active", state.active), ("stopped", state.stopped)):
            for kind, flag in flags.items():
                metrics[f"mat/{name}/{kind}"] = jnp.mean(flag, dtype=jnp.float32)
        # In full training steps: forward, backward of every probe.
        metrics["mat/refresh_steps"] = jnp.float32(mat.probes / config.batch_size)
        return state, metrics

    return refresh
