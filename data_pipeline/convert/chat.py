"""Format `chat`: conversations about images, for learning to answer.

    {"id": "7", "image": "7.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                    {"from": "gpt", "value": "A lion."}]}

This is LLaVA's layout. ShareGPT's `role` and `content`, a `system` field, and `messages` whose content is a string or a
list of {"type": "text" | "image" | "image_url"} parts are read as well. Each `<image>` is a slot, in order; as many
images as `<image>`s are asked for, but a single image without one stands first in the first question. Images are input;
the loss lies exactly on the answers. Without a template of yours a conversation reads

    system text <newline> USER: question <newline> ASSISTANT: answer     (<|end|> follows each answer, see encode)

and an answer takes the space before it along, as in format `vqa`. `--chat-template` names a tokenizer's folder or a
Jinja file instead: see chat_template. Its text is instruction, and what it writes after the last answer is left out:
nothing learns from it. Cost (run): 12 us a conversation of two questions, with a template too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_pipeline.convert.chat_template import frame_of_template
from data_pipeline.convert.draft import Draft, ImageReference
from data_pipeline.convert.fields import record_id
from data_pipeline.convert.obelics import image_reference, is_empty_image
from data_pipeline.convert.options import Options
from data_pipeline.schema import RefusedError, Rejected

CONTAINERS = ("json", "jsonl", "parquet")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = "<image>"

Piece = tuple[str | None, ImageReference | None]  # a slot; (None, None) is a placeholder whose image is not known yet
Slot = tuple[str | None, ImageReference | None, bool]  # text, image, has loss


def draft(key: str, record: dict[str, Any], options: Options) -> Draft | Rejected:
    """The document of one record, or why there is none.

    FileNotFoundError or ValueError for a chat template that is missing or cannot be used."""
    try:
        turns = _turns(record)
        _place_images(turns, _images(record, options))
        roles = tuple(role for role, _ in turns)
        frame = _frame(roles) if options.chat_template is None else frame_of_template(options.chat_template, roles)
        if frame is None or "assistant" not in roles:
            raise RefusedError("turns are not a question and an answer in turn, or the chat template refuses them")
    except RefusedError as refused:
        return Rejected(key, str(refused))
    slots = [slot for slot in _slots(turns, frame) if slot[0] != ""]
    has_image = any(image is not None for _, image, _ in slots)
    return Draft(
        texts=[text for text, _, _ in slots],
        images=[image for _, image, _ in slots],
        task="understand" if has_image else "text",
        loss=[has_loss for _, _, has_loss in slots],
        meta=record_id(record),
    )


def _turns(record: dict[str, Any]) -> list[tuple[str, list[Piece]]]:
    """(role, its text and images in order) of each turn; a system turn without text is left out."""
    names = ("conversations", "conversation", "messages")
    conversation = next((record[name] for name in names if record.get(name) is not None), None)
    if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        raise RefusedError("conversations are not a list of turns")
    system = record.get("system")
    turns: list[tuple[str, list[Piece]]] = []
    for turn in [*([{"role": "system", "content": system}] if system is not None else []), *conversation]:
        name = turn.get("from") if turn.get("from") is not None else turn.get("role")
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise RefusedError(
                f"a turn has an unknown role: {name[:40] if isinstance(name, str) else type(name).__name__}"
            )
        pieces = _pieces(turn.get("value") if turn.get("value") is not None else turn.get("content"))
        if role != "user" and any(text is None for text, _ in pieces):
            raise RefusedError("an image stands outside a question")
        if not pieces and role != "system":
            raise RefusedError("a turn is empty")
        if pieces:
            turns.append((role, pieces))
    return turns


def _pieces(content: Any) -> list[Piece]:
    """The slots of one turn's content: a string with placeholders or a list of parts. White space around it goes."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [] if content is None else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise RefusedError("a turn's content is not a string or a list of text and image parts")
    pieces: list[Piece] = []
    for part in parts:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            for number, text in enumerate(part["text"].split(PLACEHOLDER)):
                pieces += [(None, None)] if number else []
                pieces += [(text, None)] if text.strip() else []
        elif kind in ("image", "image_url"):
            image = part.get(kind)
            image = image.get("url") if kind == "image_url" and isinstance(image, dict) else image
            pieces.append((None, None if is_empty_image(image) else _reference(image)))
        else:
            raise RefusedError("a turn's content is not a string or a list of text and image parts")
    for end, strip in ((0, str.lstrip), (-1, str.rstrip)):
        if pieces and (text_at_end := pieces[end][0]) is not None:
            pieces[end] = (strip(text_at_end), None)
    return pieces


def _images(record: dict[str, Any], options: Options) -> list[ImageReference]:
    names = (options.image_column,) if options.image_column else ("image", "images")
    field: Any = next((record[name] for name in names if record.get(name) is not None), None)
    images = field if isinstance(field, list) else [] if is_empty_image(field) else [field]
    return [_reference(image) for image in images]


def _reference(image: Any) -> ImageReference:
    reference = image_reference(image)
    if reference is None:
        raise RefusedError("an image is not a path, URL, bytes or image struct")
    return reference


def _place_images(turns: list[tuple[str, list[Piece]]], images: list[ImageReference]) -> None:
    """Gives each placeholder its image, in order."""
    open_places = [(pieces, i) for _, pieces in turns for i, piece in enumerate(pieces) if piece == (None, None)]
    if not open_places and len(images) == 1:
        question = next((pieces for role, pieces in turns if role == "user"), None)
        if question is not None:
            question.insert(0, (None, images[0]))
            return
    if len(open_places) != len(images):
        raise RefusedError(f"images and placeholders differ in number: {len(images)} and {len(open_places)}")
    for (pieces, i), image in zip(open_places, images, strict=True):
        pieces[i] = (None, image)


def _frame(roles: tuple[str, ...]) -> tuple[str, ...] | None:
    """Our own template: the text before each turn and after the last. None unless questions and answers take turns."""
    body = roles[1:] if roles[:1] == ("system",) else roles
    if not body or body != ("user", "assistant") * (len(body) // 2):
        return None
    before = ("USER: ", "\nASSISTANT: ") * (len(body) // 2)
    return (*before, "") if body == roles else ("", f"\n{before[0]}", *before[1:], "")


def _slots(turns: list[tuple[str, list[Piece]]], frame: Sequence[str]) -> list[Slot]:
    """The conversation inside its frame. Text that no image or answer divides is one slot.
    A space in front of an answer goes with it, one in front of an image goes: byte-level BPE keeps a space with the
    word that follows."""
    slots: list[Slot] = []
    text = ""
    for before, (role, pieces) in zip(frame[:-1], turns, strict=True):
        text += before
        if role == "assistant":
            answer = "".join(piece or "" for piece, _ in pieces)
            space = " " if text.endswith(" ") else ""
            slots += [(text.removesuffix(" "), None, False), (space + answer, None, True)]
            text = ""
            continue
        for piece, image in pieces:
            if image is None:
                text += piece or ""
            else:
                slots += [(text.removesuffix(" "), None, False), (None, image, False)]
                text = ""
    tail = text if turns[-1][0] == "assistant" else text + frame[-1]
    return [*slots, (tail, None, False)]
