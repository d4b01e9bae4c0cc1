"""Text to batches: sources -> tokenizer -> token store -> loader -> prefetch.

    stores = open_stores(config)
    loader = Loader(stores["train"], batch_size=32, sequence_length=256, seed=0)
    batch = loader.batch(step)

The names below are imported when first used, so `import lm.data` costs nothing.
"""

import importlib

_HOMES = {
    "DataError": "lm.data.sources",
    "Document": "lm.data.sources",
    "load_tokenizer": "lm.data.tokenizer",
    "Store": "lm.data.store",
    "open_stores": "lm.data.store",
    "Loader": "lm.data.loader",
    "eval_batches": "lm.data.loader",
    "Prefetcher": "lm.data.prefetch",
    "to_global": "lm.data.prefetch",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
