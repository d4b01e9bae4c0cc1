"""From `OptimConfig` to an Optax transformation: labels, schedules and the table of optimizers.

A new optimizer is one function and one row in `OPTIMIZERS`.
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

import jax
import optax

import moe
import optim
from lm.config import ConfigError
from lm.train.config import OptimConfig, RunConfig
from lm.train.multitask import clip_tasks
from lm.train.stacked import over_layers

Labels = Any
"""A tree of str in the structure of the parameters."""


def parameter_labels(params: Any) -> Labels:
    """What each parameter is: "matrix", "embedding", "head", "router", "norm" or "bias".

    Optimizers that treat matrices specially, and weight decay, go by these labels. "matrix" leaves
    are matrices in their last two dimensions; what stands before are stacked layers or experts.
    """

    def label(path, leaf):
        names = [entry.key for entry in path]
        if names[0] in ("embedding", "head"):
            return names[0]
        if names[0] == "position_embedding":
            return "embedding"
        if names[-1] == "scale":
            return "norm"
        if names[-1] == "bias":
            return "bias"
        return "router" if "router" in names else "matrix"

    return jax.tree_util.tree_map_with_path(label, params)


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: matrices, the head and routers."""
    decayed = ("matrix", "head", "router")
    return jax.tree.map(lambda label: label in decayed, parameter_labels(params))


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, 0 .. steps - 1.

    Linear warm-up from 0 over `warmup_steps` (so the first step already moves: step s has
    (s + 1) / warmup_steps of the peak), then

    - cosine: peak to final_fraction * peak along half a cosine;
    - linear: the same along a line;
    - wsd: constant, then a line over the last decay_fraction of all steps (arXiv 2404.06395);
    - constant.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = min(config.warmup_steps, steps)
    rest = max(steps - warmup, 1)
    after: optax.Schedule
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif config.schedule == "wsd":
        decay = min(max(round(config.decay_fraction * steps), 1), rest)
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)],
            [rest - decay],
        )
    elif config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise ConfigError(
            f"optim.schedule must be cosine, wsd, linear or constant, got {config.schedule!r}"
        )
    if warmup == 0:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def _adamw(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        mu_dtype=config.state_dtype,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def _muon(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    def dimensions(params):
        # Without these, optax sends stacked [layers, in, out] weights to Adam in silence.
        return jax.tree.map(
            lambda label, leaf: (
                optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)
                if label == "matrix"
                else None
            ),
            parameter_labels(params),
            params,
        )

    muon = optax.contrib.muon(
        schedule,
        beta=config.momentum,
        eps=config.eps,
        mu_dtype=config.state_dtype,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=dimensions,
        # Updates of the root mean square that AdamW's have, so that one learning rate serves
        # both (arXiv 2502.16982, section 2.2).
        consistent_rms=0.2,
    )
    # Everything else gets our AdamW: optax's own has Nesterov momentum and no weight decay.
    return optax.partition(
        {"muon": over_layers(muon), "adamw": _adamw(config, schedule)},
        lambda params: jax.tree.map(
            lambda label: "muon" if label == "matrix" else "adamw", parameter_labels(params)
        ),
    )


def _spectra(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    tx = optim.spectra(
        schedule,
        rank_ratio=config.rank_ratio,
        min_rank=config.min_rank,
        power_iters=config.power_iters,
        momentum=config.momentum,
        eps=config.eps,
        momentum_dtype=config.state_dtype,
        weight_decay=config.weight_decay,
        weight_decay_mask=decay_mask,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        adam_eps=config.eps,
        label_fn=lambda params: jax.tree.map(
            lambda label: "spectra" if label == "matrix" else "adamw", parameter_labels(params)
        ),
        rank=config.rank,
        nesterov=config.nesterov,
        normalization=None if config.normalization == "none" else config.normalization,
    )
    return over_layers(tx)


def _adatask(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    if not config.tasks:
        raise ConfigError(
            "optim.name adatask needs optim.tasks, the number of sources "
            "(lm.train.multitask.with_tasks sets it)"
        )
    return optim.adatask(
        schedule,
        config.tasks,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        mu_dtype=config.state_dtype,
        weight_decay=config.weight_decay,
        mask=decay_mask,
        joint=config.joint_tasks,
        dominance_decay=config.dominance_decay or None,
    )


OPTIMIZERS: dict[str, Callable[[OptimConfig, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "muon": _muon,
    "spectra": _spectra,
    "adatask": _adatask,
}


def over_experts(
    config: RunConfig, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`tx` around decomposed experts (`moe.sd_moe`) where model.moe.sd_rank asks for them.

    Clipping is a part of `tx`, so it goes by the norm of the decomposed gradients.
    """
    rank = config.model.moe.sd_rank if config.model.mlp == "moe" else 0
    if not rank or config.model.adapter.kind != "none":
        return tx  # adapters leave the experts as they are
    return moe.sd_moe(tx, rank, **dataclasses.asdict(config.sd))


def make_optimizer(
    config: OptimConfig, steps: int, schedule: optax.Schedule | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The transformation (clipping by global norm first) and its learning-rate schedule.

    `schedule` takes the place of the configured one.
    """
    if config.name not in OPTIMIZERS:
        if config.name == "mat":
            raise ConfigError("optim.name mat needs lm.train.modular.make_run_optimizer")
        known = (*OPTIMIZERS, "mat")  # which wraps one of the others: lm.train.modular
        near = difflib.get_close_matches(config.name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"optim.name must be one of {', '.join(known)}, got {config.name!r}{hint}"
        )
    schedule = schedule or make_schedule(config, steps)
    tx = OPTIMIZERS[config.name](config, schedule)
    if config.clip:
        clip = optax.clip_by_global_norm(config.clip)
        if config.name == "adatask":
            clip = clip_tasks(config.clip, config.joint_tasks)
        tx = optax.chain(clip, tx)
    return tx, schedule
