"""`uvlm demo`: from a fresh clone to a trained model and its pictures, one stage after the other.

Each stage makes an artefact and knows whether it is there and whole; a stage that is done is left alone, so the demo
goes on from wherever it was stopped, and what is damaged or deleted is made again. Every stage calls what users call
for their own data: convert, tokenizer train, tokenize, launch, eval, generate.

    OUT                 the run folder (run_folder.py), with data and pictures beside
    OUT/data/source     easy-VQA as jsonl
    OUT/data/shards     canonical shards
    OUT/data/tokenizer  image codes and BPE
    OUT/data/tokens     shards with image codes
    OUT/pictures.png    24 prompts x 4 seeds
    OUT/metrics.json    the figures of the final table
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from data_pipeline.convert import Options, convert
from data_pipeline.shards import check_shard
from data_pipeline.split import Split
from data_pipeline.vocab import Vocab
from uvlm import progress, run_folder
from uvlm.check import compiler_missing, require_disk
from uvlm.config import SHIPPED, Config, load_config
from uvlm.demo import easy_vqa
from uvlm.demo.report import command, print_report
from uvlm.distributed import launch
from uvlm.metrics import read_summary

SPLITS = ("understand-train", "generate-train", "understand-valid", "generate-valid", "understand-test")
TOKENIZER_SPLITS = SPLITS[:2]  # what the tokenizers may see: no validation and no test image
NUM_RANKS = 2
_DISK_BYTES = 500_000_000  # about twice what the demo leaves behind


class Demo(NamedTuple):
    """What every stage works on."""

    out: Path
    config: Config
    overrides: list[str]

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def tokenizer(self) -> Path:
        return self.data / "tokenizer"


class Stage(Protocol):
    """One artefact: a title for the terminal, whether it is there and whole, and the work that makes it so."""

    title: str

    def is_done(self, demo: Demo) -> bool: ...

    def work(self, demo: Demo) -> None: ...


def run_demo(out: Path, overrides: Sequence[str]) -> None:
    """Run what is not done yet, then print the table. ValueError with a remedy where this machine lacks something."""
    out = out.absolute()
    if sentence := compiler_missing():
        raise ValueError(sentence)
    require_disk(out, _DISK_BYTES, "shards, checkpoints and pictures", "or pass --out")
    all_overrides = [*_paths(out), *overrides]
    demo = Demo(out, load_config(SHIPPED / "demo.yaml", all_overrides), all_overrides)
    started = time.monotonic()
    for number, stage in enumerate(STAGES, 1):
        title = f"[{number}/{len(STAGES)}] {stage.title}"
        if stage.is_done(demo):
            print(f"{title}: done before", flush=True)
            continue
        print(title, flush=True)
        stage_started = time.monotonic()
        stage.work(demo)
        print(f"{title}: {time.monotonic() - stage_started:.0f} s", flush=True)
    print_report(out, time.monotonic() - started)


class Sources:
    title = "write easy-VQA as jsonl"

    def is_done(self, demo: Demo) -> bool:
        return all(_source(demo, split).is_file() for split in SPLITS)

    def work(self, demo: Demo) -> None:
        easy_vqa.write_sources(demo.data / "source")


class Shards:
    title = "convert to shards"

    def is_done(self, demo: Demo) -> bool:
        return all(_is_whole(demo.data / "shards" / split) for split in SPLITS)

    def work(self, demo: Demo) -> None:
        for split in SPLITS:
            folder = demo.data / "shards" / split
            if not _is_whole(folder):
                format_name = "vqa" if split.startswith("understand") else "pairs"
                with progress.counter(f"  {split}") as update:
                    options = Options(image_root=Path("/"))  # the sources name the images of an installed package
                    report = convert(format_name, _source(demo, split), folder, options=options, progress=update)
                print(f"  {split}: {report.documents_out:,} documents", flush=True)


class Tokenizers:
    title = "train the image tokenizer and the text tokenizer"

    def is_done(self, demo: Demo) -> bool:
        return False  # it knows its own finished work, and costs nothing then

    def work(self, demo: Demo) -> None:
        from data_pipeline.tokenizer_training import train_tokenizers

        with progress.bars() as update:
            folders = [demo.data / "shards" / split for split in TOKENIZER_SPLITS]
            image = train_tokenizers(folders, demo.tokenizer, progress=update)["image"]
        print(
            f"  reconstructions: {image['psnr']:.1f} dB on {image['images_measured']} pictures held out; "
            f"{image['codes_used']} of {image['num_codes']} codes in use",
            flush=True,
        )


class Tokens:
    title = "give every image its codes"

    def is_done(self, demo: Demo) -> bool:
        return all(self._split_done(demo, split) for split in SPLITS)

    def work(self, demo: Demo) -> None:
        from data_pipeline.tokenize import tokenize

        for split in SPLITS:
            if not self._split_done(demo, split):
                with progress.bars() as update:
                    report = tokenize(
                        demo.data / "shards" / split, demo.data / "tokens" / split, demo.tokenizer, progress=update
                    )
                print(f"  {split}: {report.images:,} images", flush=True)

    def _split_done(self, demo: Demo, split: str) -> bool:
        from data_pipeline.image_tokens import image_tokenizer_fingerprint

        return _is_whole(demo.data / "tokens" / split, image_tokenizer_fingerprint(demo.tokenizer / "image"))


class Training:
    title = f"train the model: DeepSpeed ZeRO-3, {NUM_RANKS} ranks"

    def is_done(self, demo: Demo) -> bool:
        """The model is there, whole, and of this very configuration."""
        try:
            run_folder.load_model(demo.out, Vocab.load(demo.tokenizer))
            same = run_folder.read_config(demo.out) == demo.config
        except (ValueError, OSError):
            return False
        return same and "first_loss" in read_summary(demo.out)

    def work(self, demo: Demo) -> None:
        print(f"  watch it: {command('tensorboard', '--logdir', demo.out / 'tensorboard')}", flush=True)
        if code := launch(["train", str(SHIPPED / "demo.yaml"), *demo.overrides], NUM_RANKS):
            raise ValueError(f"training ended with exit code {code}, for the reason above; run the demo again to go on")


class Answers:
    title = "answer the test questions"

    def is_done(self, demo: Demo) -> bool:
        return read_summary(demo.out).get("vqa_shards") == str(self._shards(demo))

    def work(self, demo: Demo) -> None:
        from uvlm.evaluate import evaluate

        with progress.bars() as update:
            evaluate(demo.out, self._shards(demo), update)

    def _shards(self, demo: Demo) -> Path:
        return demo.data / "tokens" / "understand-test"


class Pictures:
    title = "draw pictures and judge them"

    def is_done(self, demo: Demo) -> bool:
        from PIL import Image

        try:
            Image.open(demo.out / "pictures.png").load()
        except OSError:
            return False
        return "generation_accuracy" in read_summary(demo.out)

    def work(self, demo: Demo) -> None:
        from uvlm.demo.drawing import draw_and_judge

        draw_and_judge(demo.out)


STAGES: tuple[Stage, ...] = (Sources(), Shards(), Tokenizers(), Tokens(), Training(), Answers(), Pictures())


def _source(demo: Demo, split: str) -> Path:
    return demo.data / "source" / f"{split}.jsonl"


def _is_whole(folder: Path, image_tokenizer: str | None = None) -> bool:
    """Whether a folder of shards is complete, by size, index and checksum."""
    try:
        split = Split.open(folder, image_tokenizer=image_tokenizer)
    except (ValueError, OSError):
        return False
    return all(check_shard(folder, shard, checksum=True) is None for shard in split.manifest.shards)


def _paths(out: Path) -> list[str]:
    """Overrides that put the demo's config under `out`. The values are JSON: YAML reads it, whatever a path holds."""
    tokens = out / "data" / "tokens"
    shipped = load_config(SHIPPED / "demo.yaml").data
    values: dict[str, object] = {"run": str(out), "data.tokenizer": str(out / "data" / "tokenizer")}
    for key, sources in (("data.train", shipped.train), ("data.valid", shipped.valid)):
        values[key] = [{"path": str(tokens / Path(source.path).name), "weight": source.weight} for source in sources]
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
