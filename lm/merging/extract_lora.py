"""A LoRA adapter out of a fine-tuned model: the difference to its base, cut to low rank.

For every matrix W [out, in] that fine-tuning changed, D = W_tuned - W_base is approximated by
B A with B = U sqrt(S) [out, r] and A = sqrt(S) V^T [r, in] of its truncated singular value
decomposition (`lm.merging.low_rank`); alpha equals r everywhere, so the adapter's scale is 1. The
rank of each matrix follows a budget, an energy share, or both. This is the recipe of mergekit's
extract-lora (rank budget, `distribute_scale`) with the energy rule and a report added.

The folder has the layout of PEFT: adapter_model.safetensors and adapter_config.json with
`rank_pattern` and `alpha_pattern`. What is no product of factors is saved whole under
`modules_to_save`: norms, stacked experts, and modules whose bias changed. Unchanged modules are
left out. `base+adapter` is then an input of any merge.

Tensors are read one at a time. Memory: the adapter (held until all ranks are known) and, for the
largest matrix, three to five float32 copies, twice that where the Gram form is used.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lm.merging import architecture as arch
from lm.merging.folder import check_folder, copied, write_folder
from lm.merging.low_rank import truncate
from lm.merging.numbers import to_float32
from lm.merging.pieces import PIECE
from lm.merging.store import open_store
from lm.merging.types import MergeError, Store, TensorInfo

__all__ = ["Extraction", "extract_lora"]

CONV1D = ("gpt2", "openai-gpt")
"""Model types whose matrices are stored [in, out]."""


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What is extracted, and how closely."""

    max_rank: int | None = 128
    energy: float | None = None
    """Share of each matrix's squared Frobenius norm to keep, in (0, 1]."""
    embeddings: Literal["whole", "lora", "skip"] = "whole"
    """Embeddings and output heads: saved whole, as factors, or left as in the base."""
    include: str = ""
    """Only modules whose name this regular expression finds."""
    exclude: str | None = None
    save_whole: tuple[str, ...] = ()
    """Modules whose name ends so are saved whole."""
    dtype: str = "float32"
    """Of the factors."""
    seed: int = 0

    def __post_init__(self):
        if self.max_rank is None and self.energy is None:
            raise MergeError("give a rank budget (--max-rank), an energy share (--energy) or both")
        if self.max_rank is not None and self.max_rank < 1:
            raise MergeError(f"--max-rank must be at least 1, got {self.max_rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise MergeError(f"--energy must be in (0, 1], got {self.energy}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise MergeError(f"--dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        for name in ("include", "exclude"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise MergeError(f"--{name} is no regular expression: {error}") from None


class _Adapter:
    """The adapter as it grows."""

    def __init__(self, base: Store, tuned: Store, settings: Extraction):
        self.base, self.tuned, self.settings = base, tuned, settings
        self.described = arch.describe(base)
        self.transposed = base.config.get("model_type") in CONV1D
        self.tensors: list[tuple[TensorInfo, Callable[[], Any]]] = []
        self.ranks: dict[str, int] = {}
        self.whole: list[str] = []
        self.report: dict[str, dict[str, Any]] = {}

    def differs(self, name: str) -> bool:
        """Whether a tensor has other values in the tuned model; read in parts."""
        size = arch.info(self.base, name).size
        for start in range(0, size, PIECE):
            stop = min(size, start + PIECE)
            before, after = (store.read(name, start, stop) for store in (self.base, self.tuned))
            same = before.dtype == after.dtype and np.array_equal(_bits(before), _bits(after))
            if not same and not np.array_equal(*(_wide(values) for values in (before, after))):
                return True
        return False

    def delta(self, name: str) -> np.ndarray:
        """W_tuned - W_base, float32 in the tensor's shape."""
        before, after = (_wide(store.read(name)) for store in (self.base, self.tuned))
        with np.errstate(invalid="ignore", over="ignore"):
            after -= before
        if not np.isfinite(after).all():
            raise MergeError(f"{name}: the difference of the two models holds NaN or infinity")
        return after.reshape(arch.info(self.base, name).shape)

    def add_factors(self, module: str, delta: np.ndarray, embedding: bool) -> None:
        """Factors of a matrix."""
        cut = truncate(
            delta.T if embedding or self.transposed else delta,
            self.settings.max_rank,
            self.settings.energy,
            seed=self.settings.seed,
            name=module,
        )
        root = np.sqrt(cut.s)
        self.ranks[module] = len(root)
        kind, suffix = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
        for letter, values in (("A", root[:, None] * cut.vt), ("B", cut.u * root)):
            info = TensorInfo(
                f"base_model.model.{module}.{kind}{letter}{suffix}",
                values.shape,
                self.settings.dtype,
            )
            values = values.astype(info.dtype)
            self.tensors.append((info, lambda values=values: [values.reshape(-1)]))
        self.report[f"{module}.weight"] = {
            "saved": "factors",
            "rank": len(root),
            "kept_energy": cut.kept,
            "delta_norm": cut.norm,
            "way": cut.way,
        }

    def add_whole(self, module: str, names: list[str]) -> None:
        """All tensors of a module as they are in the tuned model."""
        self.whole.append(module)
        for name in names:
            info = arch.info(self.tuned, name)
            info = TensorInfo(f"base_model.model.{name}", info.shape, info.dtype)
            self.tensors.append((info, lambda name=name: copied(self.tuned, name)))
            self.report[name] = {"saved": "whole", "kept_energy": 1.0}


def extract_lora(
    base: str,
    tuned: str,
    out: Path,
    settings: Extraction | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Write the adapter folder `out`; gives the report, which is also in lora_report.json.

    The report has for every changed tensor how it is saved and the share of its squared norm that
    is kept ("kept_energy"; before rounding to `settings.dtype`).

    Raises:
        MergeError: the models do not fit together, nothing differs, or `out` is not empty.
        StorageError: a file cannot be read or written.
    """
    settings = settings or Extraction()
    check_folder(out)
    adapter = _Adapter(open_store(base), open_store(tuned), settings)
    modules = _modules(adapter)
    for module, names in modules.items():
        _extract(adapter, module, names)
    if not adapter.tensors:
        raise MergeError(f"{base} and {tuned} do not differ in any tensor that is extracted")
    if adapter.described.tied and adapter.described.embedding in adapter.report:
        say(
            "warning: the embedding changed and is also the output head: PEFT applies the change "
            "to both only with ensure_weight_tying (or merge the adapter here)"
        )
    config = _config(adapter, base)
    files = {
        "adapter_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        "lora_report.json": (json.dumps(adapter.report, indent=1) + "\n").encode(),
    }
    write_folder(
        out,
        adapter.tensors,
        files,
        {"models": [base, tuned]},
        metadata={},
        file_name="adapter_model.safetensors",
    )
    factors = [entry for entry in adapter.report.values() if entry["saved"] == "factors"]
    say(_summary(factors, adapter))
    return adapter.report


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8)


def _wide(values: np.ndarray) -> np.ndarray:
    return to_float32(values, np.empty(values.size, np.float32))


def _modules(adapter: _Adapter) -> dict[str, list[str]]:
    """Module -> its tensors, of all that may be extracted."""
    base, tuned, settings = adapter.base, adapter.tuned, adapter.settings
    described, vocabulary = adapter.described, adapter.described.vocabulary
    problems, modules = [], {}
    for name in base.tensors:
        module = name.rpartition(".")[0] or name
        tied_head = described.tied and name == described.head
        skipped = settings.embeddings == "skip" and name in vocabulary
        if tied_head or skipped or arch.is_buffer(name) or not re.search(settings.include, module):
            continue
        if settings.exclude and re.search(settings.exclude, module):
            continue
        if tuned.aliases.get(name, name) not in tuned.tensors:
            problems.append(f"{tuned.path} lacks {name}")
            continue
        info, other = arch.info(base, name), arch.info(tuned, name)
        if info.shape != other.shape:
            problems.append(f"{name} is {list(info.shape)} and {list(other.shape)}")
        elif arch.is_float(info.dtype):
            modules.setdefault(module, []).append(name)
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise MergeError(
            f"the models do not fit together: {'; '.join(problems[:5])}{more} (--exclude or "
            "--embeddings skip leaves tensors out)"
        )
    return modules


def _extract(adapter: _Adapter, module: str, names: list[str]) -> None:
    weight = f"{module}.weight"
    changed = [name for name in names if adapter.differs(name)]
    if not changed:
        return
    # An embedding of PEFT has its own kind of factors; an output head is a plain linear layer.
    embedding = weight == adapter.described.embedding
    in_vocabulary = weight in adapter.described.vocabulary
    matrix = changed == [weight] and len(arch.info(adapter.base, weight).shape) == 2
    whole = module.endswith(adapter.settings.save_whole) if adapter.settings.save_whole else False
    if in_vocabulary and adapter.settings.embeddings == "whole":
        whole = True
    if matrix and not whole:
        adapter.add_factors(module, adapter.delta(weight), embedding)
    else:
        adapter.add_whole(module, names)


def _config(adapter: _Adapter, base: str) -> dict[str, Any]:
    """adapter_config.json."""
    ranks = adapter.ranks
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    pattern = {module: own for module, own in ranks.items() if own != rank}
    matrices = [
        name.removesuffix(".weight")
        for name, info in adapter.base.tensors.items()
        if len(info.shape) == 2 and name.endswith(".weight")
    ]
    targets = []
    for leaf in dict.fromkeys(module.rpartition(".")[2] for module in ranks):
        # PEFT takes every module with such an ending: give full names where not all are meant.
        every = [module for module in matrices if module.rpartition(".")[2] == leaf]
        mine = [module for module in ranks if module.rpartition(".")[2] == leaf]
        targets += [leaf] if len(every) == len(mine) else mine
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": Path(base).name,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": targets,
        "modules_to_save": adapter.whole or None,
        "fan_in_fan_out": adapter.transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _summary(factors: list[dict[str, Any]], adapter: _Adapter) -> str:
    saved = f"{len(adapter.whole)} modules saved whole"
    if not factors:
        return saved
    energies = [entry["delta_norm"] ** 2 for entry in factors]
    kept = np.average([entry["kept_energy"] for entry in factors], weights=energies)
    ranks = sorted(entry["rank"] for entry in factors)
    worst = min(factors, key=lambda entry: entry["kept_energy"])["kept_energy"]
    return (
        f"{len(factors)} matrices of ranks {ranks[0]} to {ranks[-1]} (median "
        f"{ranks[len(ranks) // 2]}) keep {kept:.2%} of the squared difference (least {worst:.2%}); "
        f"{saved}"
    )
