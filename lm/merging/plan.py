"""From a configuration and open stores to one `Job` for every output tensor.

`make_plan` resolves everything that a merge depends on before any tensor is read: which tensors of
which models make which output (layers renumbered), with which parameters, as which type, and the
small files of the output. All tensors that do not fit are listed at once.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from lm.merging import architecture as arch
from lm.merging.config import MergeConfig
from lm.merging.output_config import config_differences, output_config
from lm.merging.output_files import model_files, provenance
from lm.merging.parameters import find_method, resolve, unused_parameters
from lm.merging.row_map import RowMap
from lm.merging.slices import Group, groups_of, modules_of, pairs
from lm.merging.tokenizer import Vocabulary, make_vocabulary, vocabulary_warnings
from lm.merging.types import Job, MergeError, Method, Plan, Source, Store

__all__ = ["make_plan"]

PROMOTION = ("float64", "float32", "bfloat16", "float16")
SHOWN = 12


@dataclasses.dataclass
class Planner:
    """What the steps of a plan share."""

    config: MergeConfig
    method: Method
    flavor: Literal["paper", "mergekit"]
    models: tuple[str, ...]
    stores: Mapping[str, Store]
    architectures: Mapping[str, arch.Architecture]
    vocabulary: Vocabulary | None
    jobs: list[Job]
    problems: list[str]
    warnings: list[str]
    row_maps: dict[Any, RowMap] = dataclasses.field(default_factory=dict)


def make_plan(
    config: MergeConfig,
    stores: Mapping[str, Store] | Callable[[str], Store],
    *,
    seed: int = 0,
    flavor: Literal["paper", "mergekit"] | None = None,
) -> Plan:
    """Resolve a merge completely.

    Args:
        config: what is to be merged.
        stores: a store for every reference of `config.references()`, or a function that opens one.
        seed: of the random methods.
        flavor: the reading of a method where papers and mergekit differ; None is its default.

    Raises:
        MergeError: a model lacks tensors, has others, or has them in other shapes (all are
            listed), vocabularies differ, a layer range does not exist, a parameter is missing.
    """
    method = find_method(config.merge_method, flavor)
    flavor = flavor or method.flavor or "mergekit"
    opened = stores if callable(stores) else stores.__getitem__
    models = config.references()
    by_ref = {ref: opened(ref) for ref in models}
    planner = Planner(
        config,
        method,
        flavor,
        models,
        by_ref,
        {ref: arch.describe(store) for ref, store in by_ref.items()},
        None,
        [],
        [],
        [],
    )
    _refuse_quantized(planner)
    donor = config.base_model or models[0]
    planner.vocabulary = make_vocabulary(config, by_ref, _rows(planner), donor)
    planner.warnings += unused_parameters(config)
    if planner.vocabulary is None:
        planner.warnings += vocabulary_warnings(by_ref, donor)
    else:
        planner.warnings += planner.vocabulary.warnings
    layers: dict[str, list[tuple[str, int]]] = {}
    for name, module in modules_of(config, donor, planner.architectures[donor]).items():
        groups = groups_of(config, planner.method, planner.architectures, name, module)
        layers[name] = _plan_module(planner, name, groups)
    _copy_other_modules(planner, donor, layers)
    if planner.problems:
        lines = planner.problems[:SHOWN]
        if len(planner.problems) > SHOWN:
            lines.append(f"and {len(planner.problems) - SHOWN} more")
        raise MergeError("the models do not fit together: " + " | ".join(lines))
    written = {job.output for job in planner.jobs}
    model_config = _config(planner, donor, layers, written)
    files, warnings = model_files(config, by_ref, donor, planner.vocabulary, model_config)
    fingerprint = _fingerprint(planner, seed, files)
    return Plan(
        models=models,
        jobs=tuple(planner.jobs),
        files=files,
        aliases=_aliases(planner, donor, written),
        seed=seed,
        flavor=flavor,
        fingerprint=fingerprint,
        metadata=provenance(config, models, seed, flavor, fingerprint),
        warnings=tuple(dict.fromkeys(planner.warnings + warnings)),
    )


def _refuse_quantized(planner: Planner) -> None:
    """Packed integers and scales cannot be averaged: the result would be noise without an error."""
    for ref, store in planner.stores.items():
        settings = store.config.get("quantization_config")
        if settings and planner.method.name != "passthrough":
            kind = settings.get("quant_method", "") if isinstance(settings, dict) else ""
            raise MergeError(
                f"{ref} is quantized (quantization_config {kind}): {planner.method.name} needs the "
                "weights themselves; give the model it was made from, or dequantize it and remove "
                "quantization_config from its config.json"
            )


def _fingerprint(planner: Planner, seed: int, files: Mapping[str, bytes]) -> str:
    """Hash of all that the output depends on, the tokenizers included: they arrange embeddings."""
    digest = hashlib.blake2b(digest_size=16)
    identities = (planner.stores[ref].identity() for ref in planner.models)
    for part in (repr(planner.config), planner.flavor, str(seed), *identities):
        digest.update(part.encode() + b"\0")
    for name, data in sorted(files.items()):
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    for row_map in planner.row_maps.values():
        digest.update(f"{row_map.made}\0{row_map.padding}\0".encode())
        for rows in row_map.rows:
            digest.update(rows.tobytes())
    return digest.hexdigest()


def _plan_module(planner: Planner, module: str, groups: list[Group]) -> list[tuple[str, int]]:
    """Jobs of a module in the order of the output; gives the (model, layer) of each layer."""
    _plan_loose(planner, module, groups[0], before=True)
    origins, number = [], 0
    for group in groups:
        for index in range(group.length):
            t = index / (group.length - 1) if group.length > 1 else 1.0
            _plan_layer(planner, module, group, index, number, t)
            origins.append((group.lead.ref, group.lead.start + index))
            number += 1
    _plan_loose(planner, module, groups[-1], before=False)
    return origins


def _plan_layer(
    planner: Planner, module: str, group: Group, index: int, number: int, t: float
) -> None:
    prefixes, inside = [], []
    for part in group.parts:
        stack = planner.architectures[part.ref].stacks[module]
        layer = part.start + index
        prefixes.append(f"{stack.prefix}.{layer}.")
        inside.append(dict.fromkeys(stack.tensors[layer]))
    prefix = planner.architectures[group.lead.ref].stacks[module].prefix
    for rest in {rest: None for names in inside for rest in names}:
        inputs = [
            before + rest if rest in names else None
            for before, names in zip(prefixes, inside, strict=True)
        ]
        _plan_tensor(planner, f"{prefix}.{number}.{rest}", inputs, group, t)


def _plan_loose(planner: Planner, module: str, group: Group, before: bool) -> None:
    """Jobs of the tensors before or behind the layers.

    A head is written when any model of the merge has one of its own; tied models then take part
    in it with their embedding.
    """
    described = [planner.architectures[part.ref] for part in group.parts]
    every = planner.architectures.values()
    heads = {each.head for each in every if each.head is not None and not each.tied}
    wanted: dict[str, None] = {}
    for each in (*described, *every):
        for name, owner in each.loose.items():
            mine = each in described and name != each.head
            if owner == module and each.first(name) == before and (mine or name in heads):
                wanted[name] = None
    for name in wanted:
        targets = {planner.stores[part.ref].aliases.get(name) for part in group.parts}
        if len(targets) == 1 and targets <= set(planner.architectures[group.parts[0].ref].loose):
            continue  # every model shares it with the same tensor: so does the output
        inputs = [
            each.embedding if name in heads and each.tied else name if name in each.loose else None
            for each in described
        ]
        _plan_tensor(planner, name, inputs, group, 0.0)


def _plan_tensor(
    planner: Planner, output: str, inputs: list[str | None], group: Group, t: float
) -> None:
    """Add the job of one output tensor, or the reason why there is none."""
    refs = [part.ref for part in group.parts]
    found = [name for name in inputs if name is not None]
    if len(found) < len(refs):
        if arch.is_buffer(output):
            return
        lacking = [ref for ref, name in zip(refs, inputs, strict=True) if name is None]
        having = [ref for ref, name in zip(refs, inputs, strict=True) if name is not None]
        planner.problems.append(
            f"{output}: missing in {', '.join(lacking)} but in {', '.join(having)} (merge models "
            "of one architecture, or drop the extra tensor)"
        )
        return
    infos = [arch.info(planner.stores[ref], name) for ref, name in zip(refs, found, strict=True)]
    lead = group.parts.index(group.lead)
    if not all(arch.is_float(each.dtype) for each in infos):
        _copy(planner, output, refs[lead], found[lead])
        return
    shape = infos[lead].shape
    described = planner.architectures[refs[lead]]
    kind = arch.kind_of(described, found[lead], shape)
    by_token = found[lead] in described.vocabulary
    order = [k for k in range(len(refs)) if k != group.base]
    order += [] if group.base is None else [group.base]
    transform, aligned = None, by_token and planner.vocabulary is not None
    if len({info.shape[aligned:] for info in infos}) > 1:
        planner.problems.append(_misshapen(output, refs, [info.shape for info in infos], by_token))
        return
    if aligned:
        heights = tuple(infos[k].shape[0] for k in order)
        transform = _row_map(planner, tuple(refs[k] for k in order), group, heights)
        shape = (transform.height, *shape[1:])
        transform = None if transform.is_identity(heights) else transform
    method = find_method(planner.method.name, planner.flavor, kind)
    sources = []
    for k, part in enumerate(group.parts):
        own = [part.scope] if part.scope else []
        scopes, what = [*own, *group.scopes], f"the model {part.ref}"
        skip = k == group.base
        params = {} if skip else resolve(method.per_model, scopes, found[k], t, what)
        sources.append(Source(planner.models.index(part.ref), found[k], params))
    what = f"the method {method.name}"
    params = resolve(method.params, group.scopes, output, t, what)
    dtype = planner.config.out_dtype or planner.config.dtype
    base = None if group.base is None else sources.pop(group.base)
    planner.jobs.append(
        Job(
            output=output,
            shape=shape,
            dtype=dtype or _promoted([info.dtype for info in infos]),
            method=planner.method.name,
            sources=tuple(sources),
            base=base,
            params=params,
            kind=kind,
            transform=transform,
        )
    )


def _row_map(
    planner: Planner, refs: tuple[str, ...], group: Group, heights: tuple[int, ...]
) -> RowMap:
    assert planner.vocabulary is not None
    key = (refs, group.anchor, heights)
    if key not in planner.row_maps:
        planner.row_maps[key] = planner.vocabulary.row_map(refs, group.anchor, heights)
    return planner.row_maps[key]


def _misshapen(output: str, refs: list[str], shapes: list[tuple[int, ...]], by_token: bool) -> str:
    remedy = "only models of one size can be merged"
    if by_token and len({shape[1:] for shape in shapes}) == 1:
        remedy = "the vocabularies differ: align them with `tokenizer: {source: base}` or union"
    full = {ref: list(shape) for ref, shape in zip(refs, shapes, strict=True)}
    return f"{output}: {pairs(full)}; {remedy}"


def _promoted(dtypes: list[str]) -> str:
    """The type that holds all: as PyTorch promotes, float16 with bfloat16 gives float32."""
    kinds = set(dtypes)
    if len(kinds) == 1:
        return dtypes[0]
    if kinds >= {"float16", "bfloat16"} and not kinds & {"float32", "float64"}:
        return "float32"
    return next((dtype for dtype in PROMOTION if dtype in kinds), "float32")


def _copy_other_modules(planner: Planner, donor: str, planned: Mapping[str, Any]) -> None:
    """Modules that the configuration does not name are taken from the donor as they are."""
    described = planner.architectures[donor]
    copied = [name for name, owner in described.loose.items() if owner not in planned]
    for module, stack in described.stacks.items():
        if module not in planned:
            numbered = [(i, rest) for i, rests in stack.tensors.items() for rest in rests]
            copied += [f"{stack.prefix}.{index}.{rest}" for index, rest in numbered]
    for name in copied:
        _copy(planner, name, donor, name)
    if copied:
        planner.warnings.append(
            f"{len(copied)} tensors of modules that the configuration does not name (such as "
            f"{copied[0]}) are copied from {donor}"
        )


def _copy(planner: Planner, output: str, ref: str, name: str) -> None:
    info = arch.info(planner.stores[ref], name)
    params = resolve(find_method("passthrough").per_model, (), name, 0.0, "")
    source = Source(planner.models.index(ref), name, params)
    dtype = planner.config.out_dtype or planner.config.dtype
    dtype = dtype if dtype and arch.is_float(info.dtype) else info.dtype
    planner.jobs.append(Job(output, info.shape, dtype, "passthrough", (source,), None, {}))


def _rows(planner: Planner) -> dict[str, int]:
    """How many tokens each model has embeddings for."""
    rows = {}
    for ref, each in planner.architectures.items():
        name, fallback = each.embedding, planner.stores[ref].config.get("vocab_size", 1 << 31)
        rows[ref] = arch.info(planner.stores[ref], name).shape[0] if name else fallback
    return rows


def _config(
    planner: Planner, donor: str, layers: Mapping[str, Any], written: set[str]
) -> dict[str, Any]:
    """config.json of the output; empty where the donor has none."""
    configs = {ref: store.config for ref, store in planner.stores.items()}
    if not configs[donor]:
        return {}
    described = planner.architectures[donor]
    sizes: dict[str, int] = {}
    for job in planner.jobs:
        if arch.is_float(job.dtype):
            sizes[job.dtype] = sizes.get(job.dtype, 0) + math.prod(job.shape)
    heads = {each.head for each in planner.architectures.values() if each.head}
    result, warnings = output_config(
        configs,
        donor,
        described,
        layers,
        dtype=max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None,
        tied=not heads & written if heads else None,
        vocabulary=planner.vocabulary.height if planner.vocabulary else None,
    )
    planner.warnings += warnings + config_differences(configs, donor)
    return result


def _aliases(planner: Planner, donor: str, written: set[str]) -> dict[str, str]:
    """Names that are not written because their tensor is: a tied head, and what a store shares."""
    described = planner.architectures[donor]
    found = dict(planner.stores[donor].aliases)
    if described.tied and described.head is not None and described.embedding is not None:
        found[described.head] = described.embedding
    return {
        name: stored for name, stored in found.items() if stored in written and name not in written
    }
