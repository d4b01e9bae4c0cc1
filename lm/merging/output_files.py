"""The small files beside the weights: config.json, tokenizer, card, provenance; no network."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.merging.chat_templates import TEMPLATES
from lm.merging.config import MergeConfig
from lm.merging.tokenizer import Vocabulary, folder_of, tokens_of
from lm.merging.types import MergeError, Store
from lm.merging.yaml_text import nearest, show

__all__ = ["card", "model_files", "provenance", "tokenizer_files"]

SLOW = ("tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt")
"""Tokenizer files that tell the vocabulary again: dropped when it changes."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", *SLOW)
BESIDE = (
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def model_files(
    config: MergeConfig,
    stores: Mapping[str, Store],
    donor: str,
    vocabulary: Vocabulary | None,
    model_config: dict[str, Any],
) -> tuple[dict[str, bytes], list[str]]:
    """All small files of the output by name, and warnings.

    Args:
        config: what is merged.
        stores: all models.
        donor: whose files are taken: the base, or the first model.
        vocabulary: of the output where it is rearranged.
        model_config: config.json of the output; empty for models without one.
    """
    files = tokenizer_files(stores[donor], vocabulary)
    warnings = _set_chat_template(config, stores, files)
    if vocabulary is not None:
        _move_ids(vocabulary, stores[donor], model_config, files)
    if model_config:
        files["config.json"] = _json(model_config)
    files["README.md"] = card(config).encode()
    files["merge_config.yml"] = config.text.encode()
    return files, warnings


def tokenizer_files(store: Store, vocabulary: Vocabulary | None) -> dict[str, bytes]:
    """The donor's tokenizer files, or those of a rearranged vocabulary."""
    files = _read(folder_of(store), (*TOKENIZER, *BESIDE))
    if vocabulary is None:
        return files
    if vocabulary.folder != folder_of(store):
        own = [name for name in files if name in TOKENIZER or name.startswith("chat_template")]
        for name in own:
            del files[name]
        files |= _read(vocabulary.folder, (*TOKENIZER, *BESIDE[:2]))
    before = json.loads(files["tokenizer.json"])
    if tokens_of(before) == vocabulary.tokens:
        return files
    for name in SLOW:
        files.pop(name, None)
    # Without indentation Python's fast encoder does it: 0.2 s instead of 1.5 s for 150 000 tokens.
    files["tokenizer.json"] = json.dumps(vocabulary.tokenizer, ensure_ascii=False).encode()
    settings = _object(files.get("tokenizer_config.json"))
    if isinstance(settings.get("added_tokens_decoder"), dict):
        settings["added_tokens_decoder"] = {
            str(item["id"]): {key: value for key, value in item.items() if key != "id"}
            for item in vocabulary.tokenizer.get("added_tokens", ())
        }
        files["tokenizer_config.json"] = _json(settings)
    return files


def provenance(
    config: MergeConfig, models: Sequence[str], seed: int, flavor: str, fingerprint: str
) -> dict[str, str]:
    """Metadata of the safetensors files: how the weights came about, enough to do it again."""
    record = {
        "merge_method": config.merge_method,
        "models": [_short(ref) for ref in models],
        "config": config.text,
        "seed": seed,
        "flavor": flavor,
        "fingerprint": fingerprint,
    }
    return {"format": "pt", "merge": json.dumps(record, ensure_ascii=False)}


def card(config: MergeConfig) -> str:
    """README.md of the output: front matter that model hubs read, and the configuration."""
    import yaml

    models = [_short(ref) for ref in config.references()]
    head = {
        "base_model": models,
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "aniso"],
    }
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    lines = [f"- `{_short(ref)}`" for ref in config.references()]
    if config.base_model:
        lines[0] += " (base)"
    fence = "`" * (3 + config.text.count("```") * 3)
    return "\n".join(
        [
            f"---\n{front}---\n",
            "# Merged model\n",
            f"Merged by the method `{config.merge_method}` from:\n",
            *lines,
            "\nThe configuration, which is also in `merge_config.yml`:\n",
            f"{fence}yaml\n{config.text.rstrip()}\n{fence}\n",
            "Run again with `aniso-merge merge_config.yml OUT`.\n",
        ]
    )


def _short(ref: str) -> str:
    """A model's name without the folders above it: cards travel, paths do not."""
    return "+".join(Path(part).name or part for part in ref.split("+"))


def _read(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    found = {}
    for name in names:
        path = folder / name
        if path.is_file():
            found[name] = path.read_bytes()
    return found


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _object(data: bytes | None) -> dict[str, Any]:
    """A JSON object out of an optional file; empty when it is damaged: it is only an extra."""
    try:
        value = json.loads(data or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _set_chat_template(
    config: MergeConfig, stores: Mapping[str, Store], files: dict[str, bytes]
) -> list[str]:
    wanted = config.chat_template
    if wanted is None:
        return []
    if wanted == "auto":
        found = [template for store in stores.values() if (template := _template_of(store))]
        if not found:
            return ["chat_template: auto, but no model has a chat template"]
        wanted = Counter(found).most_common(1)[0][0]
    elif wanted in TEMPLATES:
        wanted = TEMPLATES[wanted]
    elif "{" not in wanted:
        known = ["auto", *TEMPLATES]
        raise MergeError(
            f"chat_template must be a name or a Jinja template, got {show(wanted)}"
            f"{nearest(wanted, known)}"
        )
    if "tokenizer_config.json" not in files:
        return ["chat_template has no effect: there is no tokenizer_config.json to put it in"]
    settings = _object(files["tokenizer_config.json"])
    files["tokenizer_config.json"] = _json(settings | {"chat_template": wanted})
    if "chat_template.jinja" in files:
        files["chat_template.jinja"] = wanted.encode()
    return []


def _template_of(store: Store) -> str | None:
    files = _read(folder_of(store), ("chat_template.jinja", "tokenizer_config.json"))
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode(errors="replace").strip()
    template = _object(files.get("tokenizer_config.json")).get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        template = {item.get("name"): item.get("template") for item in named}
    if isinstance(template, dict):
        template = template.get("default")
    return template.strip() if isinstance(template, str) else None


def _move_ids(
    vocabulary: Vocabulary, store: Store, model_config: dict[str, Any], files: dict[str, bytes]
) -> None:
    """Let bos, eos and pad ids of the donor's configs follow their tokens to the new rows."""
    old = _object(_read(folder_of(store), ("tokenizer.json",)).get("tokenizer.json"))
    names = {row: token for token, row in tokens_of(old).items()} if old else {}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        return vocabulary.tokens.get(names.get(value, ""), value)

    generation = _object(files.get("generation_config.json"))
    for part in (model_config, model_config.get("text_config"), generation):
        for key in IDS:
            if isinstance(part, dict) and part.get(key) is not None:
                part[key] = moved(part[key])
    if generation:
        files["generation_config.json"] = _json(generation)
