"""Chat templates: a conversation as the text that a model is trained on, and prompted with.

Templates are Jinja, compiled in a sandbox with what transformers gives them (raise_exception,
tojson, loop controls, `{% generation %}` marks). One thing differs: `strftime_now` always tells
`DATE`, so that the same file gives the same tokens on every day.
"""

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

from lm.data.sources import DataError, require

__all__ = ["DATE", "ChatTemplate", "load_template"]

DATE = datetime.datetime(2024, 7, 26)
"""What templates take for today: the day that Llama's fall back to where they are not told one."""
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: no text may hold them
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class ChatTemplate:
    """A Jinja template with the tokens that it may name.

    Attributes:
      source: the template.
      where: the file it came from, for messages.
      marked: whether it marks what the assistant says with `{% generation %}`.
      fingerprint: SHA-256 (hex) of everything that decides what is rendered.
    """

    def __init__(self, source: str, tokens: dict[str, str], where: str):
        """Args:
          source: the template.
          tokens: bos_token, eos_token and so on, those that there are.
          where: what error messages call it.

        Raises:
          DataError: it does not compile, or jinja2 is missing.
        """
        self.source, self.tokens, self.where = source, tokens, where
        content = json.dumps([source, tokens, DATE.isoformat()], sort_keys=True)
        self.fingerprint = hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()
        self._compile()

    def __getstate__(self) -> dict:
        return {"source": self.source, "tokens": self.tokens, "where": self.where}

    def __setstate__(self, state: dict):  # compiled templates cannot be pickled
        self.__init__(**state)

    def _compile(self) -> None:
        jinja2 = require("jinja2")
        require("jinja2.sandbox")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _generation_marks()],
        )

        def raise_exception(message):
            raise jinja2.exceptions.TemplateError(message)

        def tojson(value, ensure_ascii=False, **options):
            return json.dumps(value, ensure_ascii=ensure_ascii, **options)

        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = DATE.strftime
        try:
            self._template = environment.from_string(self.source)
        except jinja2.exceptions.TemplateError as error:
            raise DataError(f"{self.where} is no chat template: {error}") from error
        self.marked = bool(environment.marked)

    def render(
        self, messages: list[dict], *, prompt: bool = False, **options: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the spans of it (characters) that are marked.

        Args:
          messages: of the conversation.
          prompt: end with what makes the assistant speak (`add_generation_prompt`).
          options: more variables of the template (tools, ...).

        Raises:
          DataError: the template refuses the conversation.
        """
        jinja2 = require("jinja2")
        variables = {**self.tokens, "tools": None, "documents": None, **options}
        variables |= {"messages": messages, "add_generation_prompt": prompt}
        try:
            text = self._template.render(variables)
        except jinja2.exceptions.TemplateError as error:
            raise DataError(f"{self.where} refuses it: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise DataError(
                f"{self.where} cannot render it: {type(error).__name__}: {error}"
            ) from error
        pieces, spans, at = [], [], 0
        for number, piece in enumerate(text.replace(_CLOSE, _OPEN).split(_OPEN)):
            if number % 2 and piece:
                spans.append((at, at + len(piece)))
            pieces.append(piece)
            at += len(piece)
        return "".join(pieces), spans


def _generation_marks():
    """The extension that reads `{% generation %} ... {% endgeneration %}`."""
    jinja2 = require("jinja2")
    extension = require("jinja2.ext")

    class GenerationMarks(extension.Extension):
        """Puts noncharacters around what is marked: wherever a macro moves it, they go along."""

        tags = {"generation"}

        def __init__(self, environment):
            super().__init__(environment)
            environment.extend(marked=False)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            self.environment.marked = True
            call = self.call_method("_mark")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, caller):
            return f"{_OPEN}{caller()}{_CLOSE}"

    return GenerationMarks


def load_template(tokenizer: str, chosen: str = "", known: dict[str, str] | None = None):
    """The chat template of a tokenizer.

    Args:
      tokenizer: "byte", or the path of a tokenizer.json or of a folder that holds one; beside it
        lie chat_template.jinja or tokenizer_config.json (`chat_template`).
      chosen: instead of its own: the file of a template, or a name of
        `lm.merging.chat_templates.TEMPLATES`.
      known: bos_token and eos_token, where no file beside the tokenizer names them.

    Returns:
      ChatTemplate.

    Raises:
      DataError: there is none, or it cannot be used.
    """
    from lm.merging.chat_templates import TEMPLATES

    folder = None
    if tokenizer != "byte":
        path = Path(tokenizer).expanduser()
        folder = path if path.is_dir() else path.parent
    settings = _settings(folder) if folder else {}
    tokens = dict(known or {})
    for name in _TOKENS:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    if chosen in TEMPLATES:
        return ChatTemplate(TEMPLATES[chosen], tokens, f"the chat template {chosen}")
    if chosen:
        file = Path(chosen).expanduser()
        if not file.is_file():
            raise DataError(
                f"data.chat_template {chosen!r} is neither a file nor one of {', '.join(TEMPLATES)}"
            )
        return ChatTemplate(_read(file), tokens, f"the chat template {file}")
    if folder and (folder / "chat_template.jinja").is_file():
        file = folder / "chat_template.jinja"
        return ChatTemplate(_read(file), tokens, f"the chat template {file}")
    source = settings.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get("default")
    if not isinstance(source, str):
        raise DataError(
            f"the tokenizer {tokenizer} has no chat template: choose one with "
            f"data.chat_template, a file or one of {', '.join(TEMPLATES)}"
        )
    return ChatTemplate(source, tokens, f"the chat template of {folder}")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _settings(folder: Path) -> dict[str, Any]:
    settings = {}
    for name in ("special_tokens_map.json", "chat_template.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file():
            try:
                settings |= json.loads(_read(file))
            except (ValueError, TypeError) as error:
                raise DataError(f"{file} is no JSON object that can be read: {error}") from error
    return settings
