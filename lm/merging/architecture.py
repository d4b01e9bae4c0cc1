"""What a checkpoint is made of, read off its tensor names and config.json.

No list of supported models: a stack of layers is a prefix that is followed by a number
(`model.layers.0.`, `transformer.h.0.`, `gpt_neox.layers.0.`), and what stands outside the stacks
is told by its name and shape. A checkpoint without layers is a set of plain named tensors.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lm.merging.types import MergeError, Store, TensorInfo

__all__ = [
    "Architecture",
    "Stack",
    "describe",
    "info",
    "is_buffer",
    "is_float",
    "kind_of",
    "layer_count_path",
    "names",
]

EMBEDDINGS = re.compile(
    r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|shared|embeddings)\.weight$"
)
HEADS = re.compile(
    r"(^|\.)(lm_head(\.linear|\.decoder)?|embed_out|output|output_layer|proj_out|vocab_projector"
    r"|cls\.predictions\.decoder)\.(weight|bias)$"
)
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|attn\.bias|position_ids)$")
FIRST = re.compile(r"embed(?!_out)|emb\.|wte|wpe|ln_pre|layernorm_pre|^shared\.|patch_|conv\d")
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
ENCODER_KEYS = {"encoder": ("encoder_layers",), "decoder": ("num_decoder_layers", "decoder_layers")}


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers `prefix.0` to `prefix.{count - 1}`."""

    prefix: str
    count: int
    tensors: Mapping[int, tuple[str, ...]]
    """Of each layer, in the file's order: the names behind `prefix.index.`"""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One checkpoint: modules with layers, and the tensors outside them."""

    stacks: Mapping[str, Stack]
    """By module: "default" where there is one stack, else "text_decoder", "vision_tower", ..."""
    loose: Mapping[str, str]
    """Tensors outside the stacks: name -> the module they belong to."""
    embedding: str | None
    """The input embedding."""
    head: str | None
    """The output projection, as far as it is in the files."""
    tied: bool
    """Whether input embedding and output projection are one tensor: by the config (then a stored
    head is not read), by sharing, or because there is no head."""
    vocabulary: frozenset[str]
    """Tensors with one row for every token."""

    def first(self, name: str) -> bool:
        """Whether a loose tensor stands before the layers (goes with the first slice)."""
        return name == self.embedding or (FIRST.search(name) is not None and name != self.head)


def names(store: Store) -> tuple[str, ...]:
    """All tensor names of a store, those that share a stored tensor included."""
    return (*store.tensors, *(name for name in store.aliases if name not in store.tensors))


def info(store: Store, name: str) -> TensorInfo:
    """Shape and type of a tensor, also by a shared name."""
    return store.tensors[store.aliases.get(name, name)]


def is_buffer(name: str) -> bool:
    """Whether it is no parameter: a model's code makes it itself, so it may be missing."""
    return BUFFERS.search(name) is not None


def is_float(dtype: str) -> bool:
    """Whether values of this type are merged; others (counters, masks) are copied."""
    return "float" in dtype


def kind_of(architecture: Architecture, name: str, shape: tuple[int, ...]) -> str:
    """`Job.kind` of a tensor."""
    if name in architecture.vocabulary and len(shape) > 1:
        return "embedding"
    return "matrix" if len(shape) == 2 else "vector" if len(shape) == 1 else "other"


def describe(store: Store) -> Architecture:
    """Infer the architecture of a checkpoint.

    Raises:
        MergeError: a layer of a stack is missing.
    """
    stacks, loose = {}, []
    for name in names(store):
        match = re.match(r"(.*?)\.(\d+)\.(.+)$", name)
        if match is None:
            loose.append(name)
        else:
            layers = stacks.setdefault(match[1], {})
            layers.setdefault(int(match[2]), []).append(match[3])
    main = {prefix: layers for prefix, layers in stacks.items() if _is_stack(prefix, layers)}
    whole = [prefix for prefix in stacks if len(stacks[prefix]) == max(stacks[prefix]) + 1]
    if not main and whole:  # a list with holes (modules without weights between) is no stack
        prefix = max(whole, key=lambda prefix: sum(map(len, stacks[prefix].values())))
        main = {prefix: stacks[prefix]}
    for prefix in stacks.keys() - main.keys():
        numbered = [(i, rest) for i, rests in stacks[prefix].items() for rest in rests]
        loose += [f"{prefix}.{i}.{rest}" for i, rest in numbered]
    built = {}
    for prefix, layers in main.items():
        count = max(layers) + 1
        if missing := [index for index in range(count) if index not in layers]:
            raise MergeError(
                f"{store.path}: layers {missing[:8]} of {prefix} are missing (it has {count})"
            )
        tensors = {index: tuple(rest) for index, rest in layers.items()}
        module = _module(prefix) if len(main) > 1 else "default"
        while module in built:
            module += "_2"
        built[module] = Stack(prefix, count, tensors)
    return _with_vocabulary(store, built, loose)


def layer_count_path(config: Mapping[str, Any], module: str, count: int) -> tuple[str, ...] | None:
    """Where config.json keeps a module's number of layers, as a path of keys.

    The key must hold `count`, so that nothing else is changed by mistake.
    """
    keys = (*ENCODER_KEYS.get(module, ()), *LAYER_KEYS)
    inner = [key for key in config if isinstance(config[key], Mapping)]
    wanted = "vision" if "vision" in module else "text"
    inner.sort(key=lambda key: (wanted not in key, key))
    if module == "vision_tower":
        paths = [(name, key) for name in inner for key in keys]
    else:
        paths = [(key,) for key in keys] + [(name, key) for name in inner for key in keys]
    for path in paths:
        value: Any = config
        for key in path:
            value = value.get(key)
            if value is None:
                break
        if value == count and not isinstance(value, bool):
            return path
    return None


def _is_stack(prefix: str, layers: Mapping[int, Any]) -> bool:
    """Layers of the network, not a small list of modules such as a projector's `mlp.0`."""
    known = re.search(r"(^|\.)(layers|h|blocks|block|layer|resblocks)$", prefix) is not None
    return known and 0 in layers


def _module(prefix: str) -> str:
    if re.search("visual|vision", prefix):
        return "vision_tower"
    for name in ("encoder", "decoder"):
        if re.search(rf"(^|\.){name}\.", prefix):
            return name
    return "text_decoder"


def _with_vocabulary(store: Store, stacks: dict[str, Stack], loose: list[str]) -> Architecture:
    config = store.config
    text = next((config[key] for key in ("text_config",) if isinstance(config.get(key), dict)), {})
    rows = config.get("vocab_size", text.get("vocab_size"))
    embeddings, heads, vocabulary = [], [], set()
    for name in loose:
        shape = info(store, name).shape
        by_shape = len(shape) == 2 and rows is not None and shape[0] == rows
        if EMBEDDINGS.search(name) and len(shape) == 2:
            embeddings.append(name)
        elif HEADS.search(name) and shape:
            heads.append(name)
        elif not by_shape or re.search("pos|wpe|type", name):
            continue
        vocabulary.add(name)
    embedding = embeddings[0] if embeddings else None
    weights = [name for name in heads if name.endswith(".weight")]
    head = weights[0] if weights else None
    flag = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    shared = head is not None and store.aliases.get(head) == embedding
    is_tied = embedding is not None and (head is None or shared or flag is True)
    owners = {name: _owner(name, stacks) for name in loose}
    return Architecture(stacks, owners, embedding, head, is_tied, frozenset(vocabulary))


def _owner(name: str, stacks: Mapping[str, Stack]) -> str:
    """The module of a loose tensor."""
    if len(stacks) < 2:
        return next(iter(stacks), "default")
    if re.search("projector|merger", name):
        return "multi_modal_projector"
    owner = _module(name)
    if owner in stacks:
        return owner
    return "shared" if "text_decoder" not in stacks else "text_decoder"
