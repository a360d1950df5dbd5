"""A model's chat template as the text around the turns of a conversation, for format `chat`.

A template is a Jinja program that comes with a tokenizer: `chat_template.jinja`, or `chat_template` in
`tokenizer_config.json`. transformers renders it in its sandbox; no code of the folder runs, and the tokenizer itself is
not loaded. It is rendered with a marker of private-use characters for each turn's content, which no template writes,
and the result is cut at the markers: what lies between them is the template's own text, and no content can pass for it.
What a template makes of the roles is rendered once for each sequence of roles and kept, so a conversation costs nothing
(run: 17 us for a new sequence of four; 0.5 s for the import of transformers in each process).

The template's bos token is left out, because `encode` begins every document with one.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

MARKER = re.compile("\ue000([0-9]+)\ue001")
PROBE = ("user", "assistant", "user", "assistant")
SPECIAL_TOKENS = ("eos_token", "unk_token", "pad_token")


@functools.lru_cache(maxsize=1024)
def frame_of_template(path: Path, roles: tuple[str, ...]) -> tuple[str, ...] | None:
    """The text before each turn and after the last; None where the template refuses these roles or leaves out, repeats
    or moves one of their contents. FileNotFoundError or ValueError for a template that does so with a plain question
    and answer, or cannot be read."""
    template, tokens, as_parts = _template(path)
    try:
        return _frame(template, tokens, as_parts, roles)
    except Exception:  # a template stops at turns that it does not like by any error, mostly its own raise_exception
        return None


@functools.lru_cache(maxsize=8)
def _template(path: Path) -> tuple[str, dict[str, str], bool]:
    """(Jinja source, special tokens, whether it wants contents as lists of parts), after a trial."""
    template, tokens = _read(path)
    reason = "it leaves out, repeats or moves contents"
    for as_parts in (False, True):
        try:
            if _frame(template, tokens, as_parts, PROBE) is not None:
                return template, tokens, as_parts
        except Exception as error:
            reason = f"{error}".partition("\n")[0]
    raise ValueError(f"chat template {path} cannot render a plain question and answer ({reason}); give another one")


def _frame(template: str, tokens: dict[str, str], as_parts: bool, roles: tuple[str, ...]) -> tuple[str, ...] | None:
    from transformers.utils.chat_template_utils import render_jinja_template

    markers = [f"\ue000{i}\ue001" for i in range(len(roles))]
    messages = [
        {"role": role, "content": [{"type": "text", "text": marker}] if as_parts else marker}
        for role, marker in zip(roles, markers, strict=True)
    ]
    # A template that knows `date_string` would write the day of the conversion; this is Llama's own stand-in
    rendered = render_jinja_template([messages], chat_template=template, date_string="26 Jul 2024", **tokens)[0][0]
    found = MARKER.split(rendered)  # text, number, text, number, ..., text
    return tuple(found[::2]) if found[1::2] == [str(i) for i in range(len(roles))] else None


def _read(path: Path) -> tuple[str, dict[str, str]]:
    if path.is_file():
        return _text(path), {"bos_token": ""}
    if not path.is_dir():
        raise FileNotFoundError(f"chat template {path} is missing; give a tokenizer's folder or a Jinja file")
    config: Any = {}
    if (path / "tokenizer_config.json").is_file():
        text = _text(path / "tokenizer_config.json")
        try:
            config = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{path}/tokenizer_config.json is not JSON; copy the tokenizer's folder again") from None
    config = config if isinstance(config, dict) else {}
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[0].get("template") if named else None
    if (path / "chat_template.jinja").is_file():
        template = _text(path / "chat_template.jinja")
    if not isinstance(template, str):
        raise ValueError(f"{path} has no chat template; give a folder with a chat_template.jinja, or a Jinja file")
    tokens = {"bos_token": ""}
    for name in SPECIAL_TOKENS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    return template, tokens


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; give a tokenizer's folder or a Jinja file") from None
