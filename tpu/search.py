"""Which mesh, remat policy and number of micro-batches: arithmetic first, then the compiler.

Every product of mesh axes that the model and the batch can fill is estimated by arithmetic (seconds
for all of them together); the best few, by memory and then time, are compiled, and ranked by what
their plans say.
"""

import dataclasses
import itertools
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

from lm import recipes, sharding
from lm.config import ConfigError
from lm.train.config import MeshConfig, RunConfig
from lm.train.flops import parameter_count
from tpu import estimate
from tpu.chips import NODE_GPUS, Target
from tpu.show import gib, mesh_text, seconds

AXES = ("data", "fsdp", "expert", "tensor")
REMAT_FLOPS = {"none": 1.0, "dots": 1.03, "attention": 1.3, "full": 4 / 3}
"""Products of a step, by policy, for those of a step that keeps everything."""
SHORTLIST = 3
"""Candidates of one mesh that may be compiled, so that not all are alike."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    config: RunConfig
    bytes: float
    """Rough bytes of one device."""
    seconds: float
    """Rough seconds of a step; 0 where no rates are known."""


def search(
    config: RunConfig,
    target: Target,
    compiler: str,
    memory: int | None = None,
    limit: int = 4,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Plans (`tpu.estimate.make_plan`) of the most promising candidates, the best first.

    Raises:
      ConfigError: no mesh of that many devices suits the model and its batch.
    """
    found = shortlist(list(candidates(config, target)), memory or target.memory, limit)
    plans = []
    for number, candidate in enumerate(found, 1):
        chosen = candidate.config
        mesh = {name: n for name, n in dataclasses.asdict(chosen.mesh).items() if n > 1}
        progress(
            f"{number} of {len(found)}: {mesh_text({'mesh': mesh})}, remat {chosen.model.remat}, "
            f"{chosen.micro_batches} micro-batches (about {gib(candidate.bytes)})"
        )
        plan = estimate.make_plan(chosen, target, compiler, memory)
        plans.append(plan | {"flags": flags(chosen)})
    return rank(plans)


def rank(plans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What fits first, then by time, then by memory."""

    def key(plan):
        took, total = plan["step_seconds"], plan["bytes_per_device"]["total"]
        return plan["fits"] is False, took or math.inf, total or math.inf

    return sorted(plans, key=key)


def candidates(config: RunConfig, target: Target) -> Iterator[Candidate]:
    """All meshes of the target's devices, remat policies and micro-batches that can run."""
    weigh = _Arithmetic(config, target)
    micros = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
    for sizes in meshes(target.devices):
        if sizes["expert"] > 1 and config.model.mlp != "moe":
            continue
        shape = types.SimpleNamespace(shape=dict.fromkeys(sharding.MESH_AXES, 1) | sizes)
        for micro, remat in itertools.product(micros, REMAT_FLOPS):
            try:
                sharding.check_mesh(config.model, config.batch_size, micro, shape)
            except ConfigError:
                continue
            model = dataclasses.replace(config.model, remat=remat)
            mesh = MeshConfig(**sizes)
            one = dataclasses.replace(config, model=model, mesh=mesh, micro_batches=micro)
            yield Candidate(one, weigh.bytes(one), weigh.seconds(one))


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to write `devices` as a product of the axes."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for sizes in itertools.product(divisors, repeat=len(AXES)):
        if math.prod(sizes) == devices:
            yield dict(zip(AXES, sizes, strict=True))


def shortlist(found: list[Candidate], limit: float | None, count: int) -> list[Candidate]:
    """The `count` best by arithmetic: those that should fit by time, then the rest by memory."""
    if not found:
        raise ConfigError("no mesh of these devices divides the model's sizes and its batch")

    def key(each: Candidate):
        over = 0 if limit is None or each.bytes <= limit else each.bytes / limit
        return over, each.seconds, each.bytes

    taken: list[Candidate] = []
    for each in sorted(found, key=key):
        if sum(other.config.mesh == each.config.mesh for other in taken) < SHORTLIST:
            taken.append(each)
        if len(taken) == count:
            break
    return taken


def flags(config: RunConfig) -> str:
    """What to give train.py for this candidate."""
    mesh = dataclasses.asdict(config.mesh)
    theirs = dataclasses.asdict(recipes.get(config.recipe).mesh)
    words = [f"--mesh.{axis} {mesh[axis]}" for axis in AXES if mesh[axis] != theirs[axis]]
    words += [f"--model.remat {config.model.remat}", f"--micro-batches {config.micro_batches}"]
    return " ".join(words)


def render(plans: list[dict[str, Any]]) -> str:
    """One line for each plan, the best first."""
    lines = []
    for number, plan in enumerate(plans, 1):
        total, limit = plan["bytes_per_device"]["total"], plan["bytes_limit"]
        used = gib(total) if total else "too much"
        fit = "" if limit is None else f" of {gib(limit)}" + ("" if plan["fits"] else ", NO FIT")
        took = ""
        if plan["step_seconds"]:
            took = f"  {seconds(plan['step_seconds'])}, MFU {plan['mfu']:.1%}"
        lines.append(f"{number}. {plan['flags']}\n   {used}{fit}{took}")
    return "\n".join(lines) + "\n"


class _Arithmetic:
    """Rough memory and time of a candidate, without compiling anything."""

    def __init__(self, config: RunConfig, target: Target):
        import jax

        from lm import model
        from lm.train.modular import make_run_optimizer
        from lm.train.state import init_state

        self.target = target
        axes = model.logical_axes(config.model)
        is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
        leaves = jax.tree.leaves(model.abstract_params(config.model))
        names = jax.tree.leaves(axes, is_leaf=is_axes)
        self.leaves = [
            (leaf.size, [axis for name in each for axis in sharding.RULES[name]])
            for leaf, each in zip(leaves, names, strict=True)
        ]
        self.item = leaves[0].dtype.itemsize
        state = jax.eval_shape(lambda: init_state(config, make_run_optimizer(config)[0]))
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state))
        self.per_weight = held / sum(leaf.size for leaf in leaves)
        """Bytes of optimizer state for each parameter."""

    def weights(self, config: RunConfig, without: tuple[str, ...] = ()) -> float:
        """Parameters on one device, mesh axes in `without` left out."""
        mesh = dataclasses.asdict(config.mesh)
        return sum(
            size / math.prod(mesh[axis] for axis in axes if axis not in without)
            for size, axes in self.leaves
        )

    def tokens(self, config: RunConfig) -> float:
        """Of one micro-batch on one device."""
        mesh = config.mesh
        rows = config.batch_size / config.micro_batches / (mesh.data * mesh.fsdp * mesh.expert)
        return rows * config.sequence_length

    def bytes(self, config: RunConfig) -> float:
        model, mesh = config.model, config.mesh
        width = 4 if model.dtype == "float32" else 2
        visits = model.moe.top_k if model.mlp == "moe" else 1
        hidden = model.d_expert if model.mlp == "moe" else model.d_ff
        heads = model.num_heads * model.head_dim / mesh.tensor
        products = heads * (2 + 2 * model.num_kv_heads / model.num_heads) + model.d_model
        products += visits * (3 * hidden / mesh.tensor + model.d_model)
        kept = {"full": 0.0, "attention": heads, "dots": products, "none": 2.5 * products}
        layer = model.d_model + kept[model.remat]
        tokens = self.tokens(config)
        stacked = model.num_layers * tokens * layer * width
        working = tokens * 2.5 * products * width + tokens * model.d_model * 4
        gradients = 4 * (2 if config.micro_batches > 1 else 1)
        return self.weights(config) * (self.item + self.per_weight + gradients) + stacked + working

    def seconds(self, config: RunConfig) -> float:
        target, mesh, model = self.target, config.mesh, config.model
        if target.chip is None:
            return 0.0
        ideal = estimate.ideal_flops(config, target.devices)["causal"]
        if ideal is None:
            ideal = 6.0 * parameter_count(model, active=True) * config.batch_size
            ideal *= config.sequence_length / target.devices
        rate = target.chip.bf16_flops * target.link.product_share
        compute = ideal * REMAT_FLOPS[model.remat] / rate
        tokens, micro = self.tokens(config), config.micro_batches
        moved = 0.0
        if mesh.fsdp > 1:  # weights gathered forwards and backwards, gradients scattered in f32
            whole = self.weights(config, ("fsdp",))
            gathers = 2 if model.remat == "none" else 3
            moved += micro * whole * (2 * gathers + 4) / self._rate("fsdp", mesh)
        if mesh.data > 1:
            moved += 2 * 4 * self.weights(config) / self._rate("data", mesh)
        if mesh.tensor > 1:
            size = tokens * model.d_model * 2
            moved += micro * model.num_layers * 4 * 2 * size / self._rate("tensor", mesh)
        if mesh.expert > 1:
            size = tokens * model.d_model * 2 * model.moe.top_k
            moved += micro * model.num_layers * 4 * size / self._rate("expert", mesh)
        return max(compute, moved) + 0.1 * min(compute, moved)

    def _rate(self, axis: str, mesh: MeshConfig) -> float:
        """Bytes/s of a ring along a mesh axis: inside of a node or over the network."""
        link = self.target.link
        if self.target.platform == "tpu":
            return 2 * link.link
        order = [name for name in sharding.MESH_AXES if name != "data"]
        inner = math.prod(
            getattr(mesh, name) for name in order[order.index(axis) + 1 if axis in order else 0 :]
        )
        if inner * getattr(mesh, axis) <= NODE_GPUS:
            return link.link
        return min(link.link, max(1, NODE_GPUS // inner) * link.network)
