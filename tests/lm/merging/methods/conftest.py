"""Runs a method over arrays in blocks, as the engine does over files."""

import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from lm.merging.methods import get
from lm.merging.types import Block, Job, Method, Source, TensorInfo

BASE = np.array([[1, -1, 0.5, 2], [0, 0.25, -0.75, 1.5], [-2, 0.1, 0.3, -0.4]])
TASKS = np.array(
    [
        [[0.9, -0.2, 0.05, 0.4], [-0.7, 0.3, 0, -0.1], [0.6, 0.15, -0.8, 0.25]],
        [[0.5, 0.35, -0.45, -0.3], [0.2, -0.6, 0.1, 0.55], [-0.4, 0.7, -0.15, 0.65]],
        [[-0.1, 0.75, 0.2, 0.85], [-0.3, 0.45, -0.55, 0.12], [0.08, -0.95, -0.5, 0.22]],
    ]
)


class Blocks:
    """`lm.merging.types.Blocks` over arrays in memory."""

    def __init__(self, make, cuts, job):
        self.make, self.cuts, self.job = make, cuts, job

    def __call__(self):
        return (self.make(start, stop) for start, stop in self.cuts)

    def map(self, function):
        return (function(block) for block in self())


def _cuts(method: Method, shape, size, block):
    columns = max(1, shape[-1]) if shape else 1
    if method.scope == "tensor":
        return [(0, size)]
    step = max(1, block // columns) * columns if method.scope == "row" else block
    return [(start, min(start + step, size)) for start in range(0, size, step)] or [(0, 0)]


def merge(
    name,
    base,
    models,
    *,
    flavor=None,
    block=1 << 16,
    xp=np,
    random=None,
    seed=0,
    kind="matrix",
    each=None,
    statistics=None,
    tensor="w",
    more=(),
    details=False,
    **params,
):
    """Merge arrays by the method of that name.

    Args:
      each: parameters of the models, one dict for each.
      random: the numbers a method draws, one array for each model; else made from the seed.
      statistics: given instead of measured.
      more: (name, base, models) of other tensors of the whole model, for surveys.
      details: also return the statistics and the number of passes.
    """
    method = name if isinstance(name, Method) else get(name, flavor, kind)
    each = list(each or [{}] * len(models))
    per_model = tuple({p.name: p.default for p in method.per_model} | dict(e) for e in each)
    shared = {p.name: p.default for p in method.params} | params
    passes = [0]

    def make_blocks(name, base, models):
        shape = np.shape(models[0])
        size = int(np.prod(shape))
        base = None if base is None else np.asarray(base, np.float32).reshape(-1)
        models = [np.asarray(model, np.float32).reshape(-1) for model in models]
        info = TensorInfo(name, shape, "float32")

        def make(start, stop, statistics=None, whole=None):
            def place(values):
                values = values[start:stop].copy()
                if method.scope != "block":
                    columns = max(1, shape[-1]) if shape else 1
                    values = values.reshape(shape if method.scope == "tensor" else (-1, columns))
                return xp.asarray(values)

            def draw(k):
                if random is not None:
                    return place(np.asarray(random[k], np.float32).reshape(-1))
                key = [seed, k, zlib.crc32(name.encode())]
                return place(np.random.default_rng(key).random(size, np.float32))

            passes[0] += (
                (stop - start) / max(1, size) if statistics is None and whole is None else 0
            )
            return Block(
                base=None if base is None else place(base),
                models=tuple(place(model) for model in models),
                per_model=per_model,
                params=shared,
                start=start,
                random=draw,
                xp=xp,
                statistics=statistics,
                whole=whole,
                info=info,
            )

        sources = tuple(Source(k, name, settings) for k, settings in enumerate(per_model))
        job = Job(name, shape, "float32", method.name, sources, None, shared)
        return Blocks(make, _cuts(method, shape, size, block), job), make, shape

    blocks, make, shape = make_blocks(tensor, base, models)
    others = [(n, make_blocks(n, b, m)[0]) for n, b, m in more]
    if method.check:
        method.check(blocks.job)
    whole = method.survey(lambda: iter([(tensor, blocks), *others])) if method.survey else None
    if statistics is None and method.measure:
        statistics = method.measure(blocks)
    pieces = [method.apply(make(*cut, statistics, whole)) for cut in blocks.cuts]
    if method.many:
        result = {
            key: np.concatenate([np.asarray(piece[key]) for piece in pieces if key in piece])
            for key in pieces[0]
        }
    else:
        for piece, (start, stop) in zip(pieces, blocks.cuts, strict=True):
            assert piece.dtype == np.float32
            assert piece.size == stop - start
        result = np.concatenate([np.asarray(p).reshape(-1) for p in pieces]).reshape(shape)
    if details:
        return result, SimpleNamespace(statistics=statistics, whole=whole, passes=passes[0])
    return result


@pytest.fixture(scope="session")
def run():
    return merge


@pytest.fixture(scope="session")
def toy():
    """The base B, task vectors T and models M of the golden examples, float64."""
    return SimpleNamespace(B=BASE, T=TASKS, M=BASE + TASKS)
