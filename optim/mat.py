"""Modular adaptive training: update only the modules whose tangent kernel is large and moving."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim.modular_ntk import Modules, check_fit, kind_shapes

Kinds = dict[str, jax.Array]
"""One array per kind of module, of the shape of the module's index."""


class MatState(NamedTuple):
    """State of `mat`; every dict is by kind, with arrays of the shape of the module's index.

    Attributes:
      inner_state: state of the wrapped transformation.
      active: bool, modules that are updated.
      stopped: bool, modules that the temporal rule has frozen for good.
      first: f32, principal eigenvalues at the first refresh.
      change: f32, |eigenvalue - first| at the last refresh.
      first_change: f32, the same at the second refresh, the unit of the temporal rule.
      refreshes: int32 [], number of refreshes so far.
    """

    inner_state: optax.OptState
    active: Kinds
    stopped: Kinds
    first: Kinds
    change: Kinds
    first_change: Kinds
    refreshes: jax.Array


def mat(inner: optax.GradientTransformation, modules: Any) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that inactive modules stand still.

    An inactive module gets a zero update (no weight decay either), and what the inner state holds
    for it (moments, momentum) stays bit for bit what it was. Everything outside of the modules is
    always updated. Step counts are shared, so a bias correction goes on while a module rests: keep
    all modules active for the first 1 / (1 - b2) steps or so.

    State that mirrors a parameter is frozen by module. State of another shape (a cached basis, a
    factored moment) is frozen with modules that are whole leading slices (layers), and goes on
    otherwise.

    This is `skip="weights"`: gradients of inactive modules may be computed, and are not used. To
    leave out their back-propagation is the model's business, which reads `state.active`
    (`skip="branch"`); the wrapper then keeps weight decay and old momentum from moving them.

    All modules are active until `mat_refresh` says otherwise.

    Args:
      inner: the optimizer, with its learning rate and weight decay.
      modules: tree of `Modules` and None in the structure of the parameters (`label_modules`).

    Returns:
      A transformation whose `update` takes an optional extra argument `active`: bools by kind that
      replace `state.active` for this update.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optim import Modules, mat
      >>> params = {"first": jnp.ones(2), "second": jnp.ones(2)}
      >>> tx = mat(optax.sgd(0.1), {"first": Modules("a"), "second": Modules("b")})
      >>> active = {"a": jnp.array(True), "b": jnp.array(False)}
      >>> updates, _ = tx.update(params, tx.init(params), params, active=active)
      >>> print(updates["first"], updates["second"])
      [-0.1 -0.1] [0. 0.]

    References:
      Shi et al., `Train Faster, Perform Better: Modular Adaptive Training in Over-Parameterized
      Models <https://arxiv.org/abs/2405.07527>`_, 2023.
    """
    inner = optax.with_extra_args_support(inner)
    shapes = kind_shapes(modules)

    def init_fn(params):
        check_fit(modules, params)
        fill = lambda value, dtype: {  # noqa: E731
            kind: jnp.full(shape, value, dtype) for kind, shape in shapes.items()
        }
        return MatState(
            inner_state=inner.init(params),
            active=fill(True, bool),
            stopped=fill(False, bool),
            first=fill(0.0, jnp.float32),
            change=fill(0.0, jnp.float32),
            first_change=fill(0.0, jnp.float32),
            refreshes=jnp.zeros((), jnp.int32),
        )

    def update_fn(updates, state, params=None, *, active=None, **extra_args):
        active = state.active if active is None else _checked(active, shapes)
        new, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        leaf_shapes = jax.tree.map(jnp.shape, updates)

        def freeze(update, module):
            mask = module_mask(active, module, update.shape)
            return update if mask is None else jnp.where(mask, update, jnp.zeros_like(update))

        def state_mask(leaf, module, shape):
            if _is_masked(leaf):
                return leaf
            # A Python bool is a leaf, which None would not be.
            mask = _mirror_mask(active, module, shape, leaf.shape)
            return True if mask is None else mask

        masks = optax.tree.map_params(
            inner,
            state_mask,
            inner_state,
            modules,
            leaf_shapes,
            transform_non_params=lambda _: True,
            is_leaf=_is_masked,
        )
        inner_state = jax.tree.map(
            lambda mask, new, old: new if mask is True else jnp.where(mask, new, old),
            masks,
            inner_state,
            state.inner_state,
        )
        return jax.tree.map(freeze, new, modules), state._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def module_mask(active: Kinds, module: Modules | None, shape: tuple[int, ...]) -> jax.Array | None:
    """`active` of a leaf's modules, broadcastable to the leaf's shape; None outside of modules."""
    if module is None:
        return None
    flags = active[module.kind]
    order = sorted(range(len(module.axes)), key=lambda i: module.axes[i][0])
    blocks = dict(module.axes)
    mask = flags.transpose(order).reshape([blocks.get(axis, 1) for axis in range(len(shape))])
    for axis, count in module.axes:
        if count < shape[axis]:
            mask = jnp.repeat(mask, shape[axis] // count, axis)
    return mask


def _mirror_mask(active, module, shape, leaf_shape):
    """Mask of a state leaf of a parameter of `shape`, or None if it is not frozen."""
    if module is None or leaf_shape == shape:
        return module_mask(active, module, leaf_shape)
    whole = all(shape[axis] == blocks for axis, blocks in module.axes)
    depth = max((axis + 1 for axis, _ in module.axes), default=0)
    leads = depth == len(module.axes) and leaf_shape[:depth] == shape[:depth]
    return module_mask(active, module, leaf_shape) if whole and leads else None


def _is_masked(leaf) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _checked(active: Kinds, shapes: dict[str, tuple[int, ...]]) -> Kinds:
    given = {kind: jnp.shape(flags) for kind, flags in active.items()}
    if given != shapes:
        raise ValueError(f"active must hold bools of shapes {shapes} by kind, got {given}")
    return {kind: jnp.asarray(flags, bool) for kind, flags in active.items()}


def modular_rule(
    eigenvalues: Kinds, *, alpha: float = 0.1, target_active: float | None = None
) -> Kinds:
    """Which modules have a large enough kernel, each kind by itself.

    With `target_active` = p, the ceil(p n) largest of a kind's n modules (of equals, the first);
    else those with eigenvalue >= alpha * the largest of the kind. That the paper has a dynamic
    threshold is known, its formula is not: both are our reading. 0.34 is the paper's mean activity.

    Raises:
      ValueError: alpha or target_active outside of [0, 1].
    """
    share = alpha if target_active is None else target_active
    if not 0 <= share <= 1:
        name = "alpha" if target_active is None else "target_active"
        raise ValueError(f"{name} must lie in [0, 1], got {share}")
    if target_active is None:
        return {kind: value >= alpha * jnp.max(value) for kind, value in eigenvalues.items()}

    def largest(value):
        # Rounded first: 0.1 * 30 must not become 4.
        return _first(-value, math.ceil(round(target_active * value.size, 6)))

    return {kind: largest(value) for kind, value in eigenvalues.items()}


def temporal_rule(change: Kinds, last: Kinds, first: Kinds, *, beta: float = 1e-3) -> Kinds:
    """Which modules' kernels have come to rest: |change - last| < beta * first.

    `change` is |eigenvalue - eigenvalue at the first refresh| now, `last` at the refresh before,
    `first` at the second refresh. Formula and beta are those of a public re-implementation; that
    they are the paper's is not confirmed. beta = 0 stops nothing.
    """
    return {kind: jnp.abs(change[kind] - last[kind]) < beta * first[kind] for kind in change}


def random_rule(key: jax.Array, active: Kinds) -> Kinds:
    """As many modules of each kind as in `active`, chosen at random: the control experiment."""

    def choose(key, flags):
        return _first(jax.random.uniform(key, flags.shape), jnp.sum(flags))

    kinds = sorted(active)
    keys = jax.random.split(key, len(kinds))
    return {kind: choose(key, active[kind]) for kind, key in zip(kinds, keys, strict=True)}


def _first(scores, count):
    """True at the `count` smallest scores."""
    rank = jnp.argsort(jnp.argsort(scores.reshape(-1), stable=True))
    return (rank < count).reshape(scores.shape)


def mat_refresh(
    state: MatState,
    eigenvalues: Kinds,
    *,
    alpha: float = 0.1,
    target_active: float | None = None,
    beta: float = 1e-3,
    random_key: jax.Array | None = None,
) -> MatState:
    """Choose the active modules anew from fresh principal eigenvalues.

    active = modular rule and not stopped; a module that failed the modular rule may come back, one
    that the temporal rule stopped (from the third refresh on) never does. If any eigenvalue is not
    finite the state is returned as it was.

    Args:
      state: of `mat`.
      eigenvalues: f32 by kind (`principal_eigenvalues`).
      alpha, target_active: see `modular_rule`.
      beta: see `temporal_rule`; 0 never stops a module.
      random_key: with a key, as many modules as the rules would choose are chosen at random
        (`random_rule`).

    Raises:
      ValueError: eigenvalues of other kinds or shapes than the state's, or shares out of range.
    """
    shapes = {kind: flags.shape for kind, flags in state.active.items()}
    given = {kind: jnp.shape(value) for kind, value in eigenvalues.items()}
    if given != shapes:
        raise ValueError(f"eigenvalues must have shapes {shapes} by kind, got {given}")
    values = {kind: jnp.asarray(value, jnp.float32) for kind, value in eigenvalues.items()}
    count = state.refreshes
    pick = lambda condition, new, old: {  # noqa: E731
        kind: jnp.where(condition, new[kind], old[kind]) for kind in new
    }
    first = pick(count == 0, values, state.first)
    change = {kind: jnp.abs(value - first[kind]) for kind, value in values.items()}
    first_change = pick(count == 1, change, state.first_change)
    resting = temporal_rule(change, state.change, first_change, beta=beta)
    stopped = {kind: state.stopped[kind] | (resting[kind] & (count >= 2)) for kind in state.stopped}
    passing = modular_rule(values, alpha=alpha, target_active=target_active)
    active = {kind: passing[kind] & ~stopped[kind] for kind in passing}
    if random_key is not None:
        active = random_rule(random_key, active)
    new = state._replace(
        active=active,
        stopped=stopped,
        first=first,
        change=change,
        first_change=first_change,
        refreshes=optax.safe_increment(count),
    )
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in values.values()]))
    kept = state.inner_state
    new, state = new._replace(inner_state=()), state._replace(inner_state=())
    chosen = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    return chosen._replace(inner_state=kept)
