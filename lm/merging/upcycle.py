"""Mixture-of-experts models out of dense ones, by the configurations of mergekit-moe.

The base model gives attention, norms, embeddings and head. The MLP of each expert's model becomes
one expert of every layer: e.up and e.gate as they are, e.down times `residual_scale`, all three
plus N(0, noise_scale^2). The router's row of expert e in every layer, by `gate_mode`:

cheap_embed     g / |g|, g = mean over positive prompts of the sum of their tokens' embeddings,
                minus the same of the negative prompts; needs tokenizer.json and embedding rows only
random          N(0, 1)
uniform_random  uniform in [-1/sqrt(d), 1/sqrt(d)], as a fresh linear layer

mergekit's `hidden` and `hidden_avg` (hidden states of the prompts in place of the embeddings) need
a forward pass of the base model and are refused. Random numbers are a function of (seed, tensor,
position). All experts being equal with residual_scale 1, noise_scale 0 and no shared expert, the
output computes what the base does: every layout here normalizes the chosen experts' weights.

Tensors are read and written in pieces: memory does not grow with the models.
Source: the format is that of mergekit (mergekit/moe); the idea is sparse upcycling (Komatsuzaki et
al. 2022, arXiv 2212.05055).
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lm.merging import architecture as arch
from lm.merging.folder import check_folder, copied, write_folder
from lm.merging.numbers import to_float32
from lm.merging.output_files import tokenizer_files
from lm.merging.pieces import PIECE
from lm.merging.router import condition_warning, normal, router_rows
from lm.merging.store import open_store
from lm.merging.tokenizer import vocabulary_warnings
from lm.merging.types import MergeError, Store, TensorInfo
from lm.merging.upcycle_config import Expert, MoeConfig
from lm.merging.upcycle_layouts import Layout, choose_layout

__all__ = ["upcycle"]

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass
class _Work:
    """What the steps share."""

    config: MoeConfig
    layout: Layout
    base: Store
    stack: arch.Stack
    stores: dict[str, Store]
    seed: int
    width: int = 0
    """Of every expert's MLP."""
    tensors: list[tuple[TensorInfo, Callable[[], Any]]] = dataclasses.field(default_factory=list)

    def add(self, name: str, shape: tuple[int, ...], dtype: str, make: Callable[[], Any]) -> None:
        """One more output tensor."""
        dtype = self.config.dtype or dtype if arch.is_float(dtype) else dtype
        self.tensors.append((TensorInfo(name, shape, dtype), make))


def upcycle(
    config: MoeConfig,
    out: Path,
    *,
    seed: int = 0,
    shard_size: int = 5 * 10**9,
    say: Callable[[str], None] = print,
) -> None:
    """Write the mixture into the folder `out`.

    Args:
        config: from `lm.merging.upcycle_config.load_moe_config`.
        out: must be missing or empty.
        seed: of random routers and noise.
        shard_size: bytes of data per file.
        say: takes warnings.

    Raises:
        MergeError: the models do not fit together, or not into the layout; nothing is written.
        StorageError: a file cannot be read or written.
    """
    check_folder(out)
    stores = {ref: open_store(ref) for ref in config.references()}
    base = stores[config.base_model]
    described = arch.describe(base)
    if len(described.stacks) != 1:
        found = ", ".join(described.stacks) or "none"
        raise MergeError(f"{config.base_model}: need one stack of decoder layers, found: {found}")
    layout = choose_layout(config, base)
    stack = next(iter(described.stacks.values()))
    work = _Work(config, layout, base, stack, stores, seed)
    _check_experts(work)
    rows = router_rows(config, base, described.embedding, stack.count, seed)
    warnings = vocabulary_warnings(stores, config.base_model)
    warnings += condition_warning(rows[:, : len(config.experts)])
    for text in warnings:
        say(f"warning: {text}")
    _plan_tensors(work, described, rows)
    settings = layout.settings(config, base.config, work.width)
    if config.dtype:
        settings["dtype" if "dtype" in settings else "torch_dtype"] = config.dtype
    files = tokenizer_files(base, None)
    files["config.json"] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    files["moe_config.yml"] = config.text.encode()
    record = {"models": list(config.references()), "seed": seed, "moe_config": config.text}
    write_folder(
        out,
        work.tensors,
        files,
        record,
        metadata={"upcycled": json.dumps({"config": config.text, "seed": seed})},
        shard_size=shard_size,
    )
    active = config.experts_per_token + len(config.shared_experts)
    say(f"{len(config.experts)} experts in {stack.count} layers, {active} active per token")


def _check_experts(work: _Work) -> None:
    """The MLPs of all experts have the base's names and one shape, not necessarily the base's."""
    problems, expected = [], {}
    for name in PROJECTIONS:
        full = _source(work, 0, name)
        first = work.stores[work.config.experts[0].source_model]
        if first.aliases.get(full, full) not in first.tensors:
            raise MergeError(f"{first.path} lacks {full}: experts are made of gated MLPs")
        expected[name] = arch.info(first, full).shape
    hidden = int(work.base.config.get("hidden_size", expected["up_proj"][1]))
    if expected["up_proj"][1] != hidden:
        problems.append(f"the experts' width is {expected['up_proj'][1]}, the base's {hidden}")
    for expert in (*work.config.experts, *work.config.shared_experts):
        store = work.stores[expert.source_model]
        for layer in range(work.stack.count):
            for name in PROJECTIONS:
                full = _source(work, layer, name)
                if store.aliases.get(full, full) not in store.tensors:
                    problems.append(f"{store.path} lacks {full}")
                elif (shape := arch.info(store, full).shape) != expected[name]:
                    problems.append(
                        f"{full} of {store.path} is {list(shape)}, not {list(expected[name])}"
                    )
                if f"{full.removesuffix('weight')}bias" in store.tensors:
                    problems.append(f"{store.path} has biases in its MLPs")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise MergeError(
            f"the models cannot be one mixture: {'; '.join(dict.fromkeys(problems[:5]))}{more}"
        )
    work.width = expected["up_proj"][0]


def _source(work: _Work, layer: int, projection: str) -> str:
    return f"{work.stack.prefix}.{layer}.mlp.{projection}.weight"


def _plan_tensors(work: _Work, described: arch.Architecture, rows: np.ndarray) -> None:
    base, layout = work.base, work.layout
    for name in base.tensors:
        match = name.startswith(f"{work.stack.prefix}.") and ".mlp." in name
        tied_head = described.tied and name == described.head
        if match or tied_head or arch.is_buffer(name):
            continue
        info = base.tensors[name]
        work.add(name, info.shape, info.dtype, lambda name=name: copied(base, name))
    dtype = arch.info(base, described.embedding).dtype
    routed = len(work.config.experts)
    for layer in range(work.stack.count):
        prefix = f"{work.stack.prefix}.{layer}."
        gate = rows[layer, :routed]
        work.add(prefix + layout.router, gate.shape, dtype, lambda gate=gate: [gate.reshape(-1)])
        for number, expert in enumerate(work.config.experts):
            for name, other in layout.projections.items():
                output = prefix + layout.expert.format(expert=number, projection=other)
                _add_expert(work, expert, output, layer, name)
        for number, expert in enumerate(work.config.shared_experts):
            for name, other in layout.projections.items():
                output = prefix + layout.shared.format(projection=other)
                _add_expert(work, expert, output, layer, name)
            if layout.shared_gate:
                row = rows[layer, routed + number][None]
                output = prefix + layout.shared_gate
                work.add(output, row.shape, dtype, lambda row=row: [row.reshape(-1)])


def _add_expert(work: _Work, expert: Expert, output: str, layer: int, name: str) -> None:
    store, source = work.stores[expert.source_model], _source(work, layer, name)
    info = arch.info(store, source)
    scale = expert.residual_scale if name == "down_proj" else 1.0

    def make() -> Iterator[np.ndarray]:
        if scale == 1 and not expert.noise_scale:
            yield from copied(store, source)
            return
        for start in range(0, info.size, PIECE):
            stop = min(info.size, start + PIECE)
            values = store.read(source, start, stop)
            values = to_float32(values, np.empty(values.size, np.float32))
            values *= np.float32(scale)
            if expert.noise_scale:
                noise = normal(work.seed, output, start, values.size)
                values += np.float32(expert.noise_scale) * noise
            yield values

    work.add(output, info.shape, info.dtype, make)
