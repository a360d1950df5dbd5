"""Format chat: loss exactly on the answers, every image in its place, and no code of a template's folder.

The records follow the documented schemas:
LLaVA     https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md
ShareGPT  https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md (conversations, system, images)
messages  https://huggingface.co/datasets/nvidia/Nemotron-VLM-Dataset-v2/blob/main/data_format.md (content as parts)
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.convert import convert
from data_pipeline.convert.chat import draft
from data_pipeline.convert.chat_template import frame_of_template
from data_pipeline.convert.draft import Draft
from data_pipeline.convert.options import Options
from data_pipeline.schema import Document, Rejected
from data_pipeline.split import Split

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
# Llama 2's shape: an error for turns out of order, bos and eos as text, contents trimmed
LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# LLaVA's on Hugging Face: reads parts alone
PARTS = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] "
    "| selectattr('type', 'equalto', 'text') %}{{ part['text'] }} {% endfor %}{% endfor %}"
)
QUESTION, ANSWER = {"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A lion."}


def llava(*values: str, **fields: Any) -> dict[str, Any]:
    """Human and gpt in turn."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "997bb945", "conversations": turns, **fields}


def drafted(record: dict[str, Any], **options: Any) -> Draft:
    result = draft("k", record, Options(**options))
    assert isinstance(result, Draft), result
    return result


def slots(record: dict[str, Any], **options: Any) -> list[Any]:
    """Texts as they are, an answer as a tuple of one, an image as a set of one."""
    result = drafted(record, **options)
    assert result.loss is not None
    for image, has_loss in zip(result.images, result.loss, strict=True):
        assert image is None or not has_loss
    return [
        {image} if image is not None else (text,) if has_loss else text
        for text, image, has_loss in zip(result.texts, result.images, result.loss, strict=True)
    ]


def category(record: dict[str, Any], **options: Any) -> str:
    result = draft("k", record, Options(**options))
    assert isinstance(result, Rejected), result
    return result.category


def template_file(folder: Path, template: str) -> Path:
    path = folder / "chat.jinja"
    path.write_text(template, encoding="utf-8")
    return path


def test_llava_has_loss_exactly_on_the_answers() -> None:
    record = llava("<image>\nWhat is it?", "A lion.\n", "Is it asleep? ", " No", image="part-000001/9.jpg")
    assert slots(record) == [
        "USER:",
        {"part-000001/9.jpg"},
        "\nWhat is it?\nASSISTANT:",
        (" A lion.",),
        "USER: Is it asleep?\nASSISTANT:",
        (" No",),
    ]
    assert (drafted(record).task, drafted(record).meta) == ("understand", {"id": "997bb945"})


def test_images_go_to_their_placeholders_in_order() -> None:
    record = llava("Compare <image> and <image>.", "Equal.", "<image> too?", "Yes.", image=["a", b"b", {"path": "c"}])
    assert slots(record) == [
        *("USER: Compare", {"a"}, " and", {b"b"}, ".\nASSISTANT:", (" Equal.",)),
        *("USER:", {"c"}, " too?\nASSISTANT:", (" Yes.",)),
    ]


def test_one_image_without_a_placeholder_stands_first_in_the_first_question() -> None:
    record = llava("What is it?", "A lion.", image={"bytes": b"png", "path": None}, system="Be brief.")
    assert slots(record) == ["Be brief.\nUSER:", {b"png"}, "What is it?\nASSISTANT:", (" A lion.",)]


def test_text_alone_is_of_task_text_with_loss_on_the_answers() -> None:
    record = {"conversations": [{"from": "system", "value": "Be brief."}, QUESTION, ANSWER], "image": None}
    assert slots(record) == ["Be brief.\nUSER: What is it?\nASSISTANT:", (" A lion.",)]
    assert drafted(record).task == "text"


def test_messages_with_parts_are_read() -> None:
    parts = [
        {"type": "image", "image": "a.png", "metadata": {"width": 1024}},
        {"type": "text", "text": "Like", "image": None},
        {"type": "image_url", "image_url": {"url": "http://host/b.png"}},
        {"type": "text", "text": "?"},
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    result = slots({"messages": [{"role": "user", "content": parts}, answer]})
    assert result == ["USER:", {"a.png"}, "Like", {"http://host/b.png"}, "?\nASSISTANT:", (" Yes.",)]


def test_parts_without_an_image_of_their_own_take_those_of_the_record() -> None:
    question = {"role": "user", "content": [{"type": "text", "text": "This:"}, {"type": "image"}]}
    record = {"messages": [question, {"role": "assistant", "content": "A lion."}], "images": ["a.png"]}
    assert slots(record) == ["USER: This:", {"a.png"}, "\nASSISTANT:", (" A lion.",)]
    assert slots({**record, "images": None, "jpg": b"x"}, image_column="jpg")[1] == {b"x"}


IN_TURN = "turns are not a question and an answer in turn, or the chat template refuses them"
CONTENT = "a turn's content is not a string or a list of text and image parts"
NO_CONTENTS: tuple[Any, ...] = (7, True, {}, ["x"], [{}], [{"type": "text"}])
NO_IMAGE = "an image is not a path, URL, bytes or image struct"
NUMBER = "images and placeholders differ in number"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "conversations are not a list of turns"),
        ({"conversations": "abc"}, "conversations are not a list of turns"),
        ({"conversations": [QUESTION, None]}, "conversations are not a list of turns"),
        ({"conversations": []}, IN_TURN),
        ({"conversations": [QUESTION, QUESTION, ANSWER]}, IN_TURN),
        ({"conversations": [ANSWER, QUESTION]}, IN_TURN),
        ({"conversations": [QUESTION, ANSWER, QUESTION]}, IN_TURN),
        ({"conversations": [QUESTION, {"from": "tool", "value": "x"}]}, "a turn has an unknown role"),
        ({"conversations": [QUESTION, {"from": ["gpt"], "value": "x"}]}, "a turn has an unknown role"),
        ({"conversations": [QUESTION, {"value": "x"}]}, "a turn has an unknown role"),
        ({"conversations": [QUESTION, {"from": "gpt"}]}, "a turn is empty"),
        (llava("What?", " \n"), "a turn is empty"),
        *[({"conversations": [QUESTION, {"from": "gpt", "value": value}]}, CONTENT) for value in NO_CONTENTS],
        (llava("<image>?", "Yes."), NUMBER),
        (llava("<image>?", "Yes.", image=["a", "b"]), NUMBER),
        (llava("?", "Yes.", image=["a", "b"]), NUMBER),
        (llava("What?", "<image>", image="a"), "an image stands outside a question"),
        (llava("What?", "Yes.", system="<image>", image="a"), "an image stands outside a question"),
        (llava("<image>?", "Yes.", image=7), NO_IMAGE),
        (llava("<image>?", "Yes.", image=[None]), NO_IMAGE),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": 7}]}]}, NO_IMAGE),
    ],
)
def test_what_is_not_a_conversation_is_refused(record: dict[str, Any], reason: str) -> None:
    assert category(record) == reason


def test_a_template_writes_the_text_around_the_turns_and_no_loss(tmp_path: Path) -> None:
    record = llava("<image>\nWhat is it?", "A lion.", "Asleep?", "No.", image="a.png", system="Be brief.")
    assert slots(record, chat_template=template_file(tmp_path, CHATML)) == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        {"a.png"},
        "\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
        ("A lion.",),
        "<|im_end|>\n<|im_start|>user\nAsleep?<|im_end|>\n<|im_start|>assistant\n",
        ("No.",),
    ]


def test_a_tokenizer_folder_gives_its_template_and_its_tokens_and_runs_no_code(tmp_path: Path) -> None:
    config = {
        "chat_template": LLAMA,
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
    }
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    # The space before the answer goes with the answer; <s> is left out because encode begins every document itself
    assert slots(llava("One?", "1", "Two?", "2"), chat_template=tmp_path) == [
        "[INST] One? [/INST]",
        (" 1",),
        " </s>[INST] Two? [/INST]",
        (" 2",),
    ]
    assert category({"conversations": [QUESTION, QUESTION, ANSWER]}, chat_template=tmp_path) == IN_TURN
    assert not (tmp_path / "ran").exists()


def test_a_jinja_file_of_a_folder_wins_and_templates_of_parts_work(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": LLAMA}))
    (tmp_path / "chat_template.jinja").write_text(PARTS)
    result = slots(llava("<image>\nOne?", "1", image="a"), chat_template=tmp_path)
    assert result == ["user:", {"a"}, "\nOne? assistant:", (" 1",)]


def test_the_default_of_several_templates_is_taken(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": LLAMA}, {"name": "default", "template": CHATML}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert slots(llava("One?", "1"), chat_template=tmp_path)[0].startswith("<|im_start|>user")


def test_a_template_does_not_write_the_day_of_the_conversion(tmp_path: Path) -> None:
    date = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    path = template_file(tmp_path, date + "{{ date_string }}\n\n" + CHATML)
    assert slots(llava("One?", "1"), chat_template=path)[0].startswith("26 Jul 2024\n")


def test_a_template_that_takes_any_order_decides_itself(tmp_path: Path) -> None:
    record = {"conversations": [QUESTION, QUESTION, ANSWER]}
    assert slots(record, chat_template=template_file(tmp_path, CHATML))[-1] == ("A lion.",)
    no_answer = {"conversations": [QUESTION]}
    assert category(no_answer, chat_template=template_file(tmp_path, CHATML)) == IN_TURN


def test_contents_cannot_pass_for_template_text(tmp_path: Path) -> None:
    hostile = "\ue0001\ue001 {{ 7 * 7 }} <|im_end|>"
    result = slots(llava("Say it.", hostile), chat_template=template_file(tmp_path, CHATML))
    assert result[-1] == (hostile,)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}",  # moves
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",  # leaves out
        "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}",  # repeats
        "{% for m in messages %}{{ m['content'][1:] }}{% endfor %}",  # cuts
        "{% for m in messages %}",  # is no template
        "{{ raise_exception('line one\\nline two') }}",  # takes nothing
        "{{ messages.__class__.__mro__ }}",  # would leave the sandbox
        "",
    ],
)
def test_a_template_that_changes_contents_is_refused_in_one_sentence(tmp_path: Path, template: str) -> None:
    with pytest.raises(ValueError, match=r"^chat template .*chat\.jinja cannot render .*; give another one$"):
        draft("k", llava("One?", "1"), Options(chat_template=template_file(tmp_path, template)))


def test_a_template_that_is_not_there_is_an_error_that_helps(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give a tokenizer's folder or a Jinja file"):
        draft("k", llava("One?", "1"), Options(chat_template=tmp_path / "none"))
    with pytest.raises(ValueError, match="has no chat template"):
        draft("k", llava("One?", "1"), Options(chat_template=tmp_path))
    for broken, match in ((b"{", "is not JSON"), (b"\xff", "is not UTF-8"), (b"[]", "has no chat template")):
        (tmp_path / "tokenizer_config.json").write_bytes(broken)
        with pytest.raises(ValueError, match=match):
            draft("k", llava("One?", "1"), Options(chat_template=tmp_path))


def test_the_same_roles_are_rendered_once(tmp_path: Path) -> None:
    path = template_file(tmp_path, CHATML)
    before = frame_of_template.cache_info().misses
    for text in ("One?", "Two?"):
        drafted(llava(text, "1"), chat_template=path)
    assert frame_of_template.cache_info().misses == before + 1


NAMES = ("from", "role", "value", "content", "type", "text", "image", "image_url", "url", "bytes", "path")
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["image", "text"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=8,
)
TEXTS = st.text(max_size=3) | st.sampled_from(["<image>", "a <image>", "b"]) | JSON_VALUES
ANY_TURNS = st.lists(st.tuples(st.sampled_from(["human", "gpt", "system"]) | JSON_VALUES, TEXTS), max_size=3)
ORDERED = st.tuples(TEXTS, TEXTS).map(lambda pair: [("human", pair[0]), ("gpt", pair[1])])


@pytest.mark.parametrize("template", [None, CHATML])
def test_any_content_yields_a_sound_draft_or_a_rejection(
    tmp_path_factory: pytest.TempPathFactory, template: str | None
) -> None:
    path = None if template is None else template_file(tmp_path_factory.mktemp("template"), template)

    @settings(max_examples=300)
    @given(ANY_TURNS | ORDERED, JSON_VALUES | st.just("a.png"), JSON_VALUES)
    def check(turns: list[tuple[Any, Any]], image: Any, other: Any) -> None:
        conversation = [{"from": role, "value": value} for role, value in turns]
        for record in (
            {"conversations": conversation, "image": image, "system": other},
            {"messages": other, "id": image},
        ):
            result = draft("k", record, Options(chat_template=path))
            if isinstance(result, Draft):
                assert result.loss is not None
                assert any(result.loss)
                for text, reference, has_loss in zip(result.texts, result.images, result.loss, strict=True):
                    assert (text is None) != (reference is None)
                    assert isinstance(text, str | None)
                    assert isinstance(reference, str | bytes | None)
                    assert text != ""
                    assert not (has_loss and reference)

    check()


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_json_file_becomes_shards(tmp_path: Path, name: str) -> None:
    png = b"\x89PNG\r\n\x1a\n not decoded here"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png)
    records = [llava("<image>\nWhat?", "A lion.", image="a.png"), llava("<image>?", "Yes."), llava("\ud800", "Yes.")]
    lines = "\n".join(map(json.dumps, records))
    (tmp_path / name).write_text(json.dumps(records) if name == "data.json" else lines)
    report = convert("chat", tmp_path / name, tmp_path / "out", options=Options(image_root=tmp_path / "images"))
    assert (report.documents_in, report.documents_out) == (3, 1)
    assert report.rejected == {NUMBER: 1, "text is not valid UTF-8": 1}
    document = Split.open(tmp_path / "out").read(0)
    assert isinstance(document, Document)
    assert document.texts == ("USER:", None, "\nWhat?\nASSISTANT:", " A lion.")
    assert (document.task, document.loss) == ("understand", (False, False, False, True))
    assert (document.image_bytes, document.meta) == ({"0.png": png}, {"id": "997bb945"})
