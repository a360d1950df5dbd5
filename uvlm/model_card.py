"""The model card of an exported model: what is known of the run, and how to load the model. What is unknown is left
out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from data_pipeline.image_tokens import Preprocessing, codes_hw_of
from data_pipeline.schema import TASKS
from data_pipeline.shards import Manifest
from data_pipeline.vocab import Vocab
from uvlm.config import Config, SourceConfig
from uvlm.metrics import read_records, read_summary

_PACKAGES = ("uvlm", "torch", "deepspeed", "transformers")
_RESULTS = {  # by their name in the run's records
    **{f"loss/{task}": f"training loss, {task}" for task in TASKS},
    **{f"valid/{task}": f"validation loss, {task}" for task in TASKS},
    "valid/answers_right": "share of validation answers that are right",
}

# A test runs this in an exported folder.
SNIPPET = """\
import json
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer
from data_pipeline.image_tokens import ImageTokenizer  # of the package uvlm: pictures to codes and back

model = AutoModelForCausalLM.from_pretrained(".", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(".")
pictures = ImageTokenizer.load("tokenizer/image")
vocabulary = json.load(open("vocabulary.json"))
begin, start, end = (vocabulary["specials"][name] for name in ("<|bos|>", "<|image|>", "<|/image|>"))
first, rows, columns = vocabulary["first_code"], *vocabulary["codes_hw"]
codes = list(range(first, first + vocabulary["num_codes"]))

# A caption to a picture: nothing but codes can follow <|image|>.
prompt = torch.tensor([[begin, *tokenizer.encode("a red circle", add_special_tokens=False), start]])
drawn = model.generate(
    prompt, do_sample=True, temperature=0.7, max_new_tokens=rows * columns, prefix_allowed_tokens_fn=lambda *_: codes
)[0, prompt.shape[1] :]
pixels = pictures.decode((drawn - first).reshape(1, rows, columns).numpy())[0]
Image.fromarray(pixels).save("picture.png")

# A picture and a question to an answer: text only.
image = (torch.from_numpy(pictures.encode(pixels[None]).astype("int64")).flatten() + first).tolist()
question = tokenizer.encode("what color is it?", add_special_tokens=False)
prompt = torch.tensor([[begin, start, *image, end, *question]])
answer = model.generate(prompt, do_sample=False, max_new_tokens=32, suppress_tokens=codes)[0, prompt.shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""


@dataclass(frozen=True)
class Facts:
    """What a card says, each as a line (name, value) or a row of a table; empty where nothing is known."""

    model: list[tuple[str, str]]
    training: list[tuple[str, str]]
    sources: list[tuple[str, ...]]
    losses: list[tuple[str, str]]
    note: str

    @staticmethod
    def of(run: Path, config: Config, vocab: Vocab, hf_config: Any, step: int, is_finished: bool, dtype: str) -> Facts:
        """Gather from the run's config, records, environment and the manifests of its data.

        Args:
            hf_config: of the exported backbone. step: optimizer steps done. dtype: of the exported weights.
        """
        records = [record for record in read_records(run) if record["step"] <= step]
        return Facts(
            model=_model_lines(config, vocab, hf_config, dtype),
            training=_training_lines(run, config, records, step),
            sources=[_source_row(source) for source in config.data.train],
            losses=_loss_lines(records, read_summary(run) if is_finished else {}),
            note=_note(config, step, is_finished),
        )


def model_card(name: str, facts: Facts) -> str:
    """README.md in Markdown with the head that model hubs read."""
    parts = [
        "---\nlibrary_name: transformers\ntags:\n- uvlm\n- multimodal\n---",
        f"# {name}",
        "An autoregressive transformer over one vocabulary of text tokens and image codes, trained with uvlm.",
        *([facts.note] if facts.note else []),
        "## Model",
        _list(facts.model),
        "A document is `<|bos|>`, then texts and images one after the other, then `<|eos|>`. An image is `<|image|>`, "
        "its codes row by row, `<|/image|>`; a text that the model writes ends with `<|end|>`. The id of a code is the "
        "code plus `first_code`. All ids are in `vocabulary.json`; `tokenizer/` is the tokenizer folder of uvlm, and "
        "`tokenizer/image` makes codes of pictures and pictures of codes.",
        "## Training",
        _list(facts.training),
        "### Data",
        _table(("source", "weight", "documents", "shards made with image tokenizer"), facts.sources),
        *(["### Results", _list(facts.losses)] if facts.losses else []),
        "## Use",
        "In this folder:",
        f"```python\n{SNIPPET}```",
        "## License",
        "Not stated: whoever publishes this model fills it in.",
    ]
    return "\n\n".join(parts) + "\n"


def _model_lines(config: Config, vocab: Vocab, hf_config: Any, dtype: str) -> list[tuple[str, str]]:
    with torch.device("meta"):
        num_parameters = AutoModelForCausalLM.from_config(hf_config).num_parameters()
    rows, columns = codes_hw_of(config.data.tokenizer / "image") or (0, 0)
    pixels = Preprocessing.load(config.data.tokenizer / "image").image_size
    model = config.model
    lines = [
        ("architecture", f"{hf_config.architectures[0]}, {num_parameters:,} parameters in {dtype}"),
        (
            "sizes",
            f"{model.num_layers} layers of width {model.hidden_size}, gated FFN of {model.intermediate_size}, "
            f"{model.num_heads} heads of {model.head_dim} over {model.num_kv_heads} key/value heads, "
            f"{'tied' if hf_config.tie_word_embeddings else 'untied'} embeddings",
        ),
        ("longest document", f"{hf_config.max_position_embeddings:,} tokens"),
        ("vocabulary", f"{vocab.num_text:,} text tokens, 6 specials, {vocab.num_codes:,} image codes"),
    ]
    if rows:
        lines.append(("images", f"{pixels} x {pixels} pixels as {rows} x {columns} codes"))
    return lines


def _training_lines(run: Path, config: Config, records: list[dict[str, Any]], step: int) -> list[tuple[str, str]]:
    data, optim = config.data, config.optim
    fills = [record["data/fill_share"] for record in records if "data/fill_share" in record]
    places = step * data.num_rows * data.pack_tokens
    seen = f", about {places * sum(fills) / len(fills):,.0f} tokens of documents" if fills else ""
    lines = [
        ("steps", f"{step:,} of {data.num_rows} packs of {data.pack_tokens:,} tokens{seen}"),
        (
            "policy",
            f"{config.policy.title} (input images: {config.policy.input.name}, target images: "
            f"{config.policy.target.name})",
        ),
        ("learning rate", f"{optim.learning_rate:g}, {optim.schedule} schedule, {optim.warmup_steps} steps of warm-up"),
        ("dtype", f"{config.dtype}, seed {config.seed}"),
    ]
    if tasks := [task for task in TASKS if any(f"loss/{task}" in record for record in records)]:
        lines.append(("tasks", ", ".join(tasks)))
    if config.model.init_from:
        lines.insert(0, ("started from", config.model.init_from.name))
    if versions := _versions(run / "environment.txt"):
        lines.append(("versions", versions))
    return lines


def _versions(path: Path) -> str:
    """Of the packages that trained it; environment.txt has a line name==version each."""
    text = path.read_text() if path.is_file() else ""
    pairs = [line.split("==", 1) for line in text.splitlines() if "==" in line]
    versions = {name.lower(): version for name, version in pairs}
    return ", ".join(f"{name} {versions[name]}" for name in _PACKAGES if name in versions)


def _source_row(source: SourceConfig) -> tuple[str, ...]:
    weight = source.weight
    said = (
        ", ".join(f"{w:g} from step {at}" for at, w in sorted(weight.items()))
        if isinstance(weight, dict)
        else f"{weight:g}"
    )
    try:
        manifest = Manifest.load(source.path)
    except (OSError, ValueError):  # moved, or no network here: the card says nothing of it
        return source.source().name, said, "", ""
    return source.source().name, said, f"{manifest.samples:,}", manifest.image_tokenizer or ""


def _loss_lines(records: list[dict[str, Any]], summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The last loss of each task in training and validation, and what is known of answers."""
    last = {name: (value, record["step"]) for record in records for name, value in record.items()}
    lines = [
        (said, f"{value:.4f} at step {step:,}")
        for name, said in _RESULTS.items()
        if name in last
        for value, step in [last[name]]
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    if "vqa_accuracy" in summary and "vqa_questions" in summary:
        lines.append(("answer accuracy", f"{summary['vqa_accuracy']:.4f} over {summary['vqa_questions']:,} questions"))
    return lines


def _note(config: Config, step: int, is_finished: bool) -> str:
    notes = [] if is_finished else [f"Training was at step {step:,} of {config.optim.steps:,}."]
    policy = config.policy.at_inference()
    names = dict.fromkeys(image.name for image in (policy.input, policy.target) if image.name != "dense")
    if names:
        notes.append(
            f"Trained to leave out image tokens ({', '.join(names)}). `transformers` leaves out none, so this is not "
            "quite the model that was trained and evaluated: results below are those of the trained one."
        )
    return " ".join(notes)


def _list(lines: list[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in lines)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
