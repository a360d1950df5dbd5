"""The command line. Each command imports what it needs when it runs, so `uvlm --help` costs a few tenths of a second.

What the user can mend is one sentence on standard error and exit code 1; UVLM_TRACEBACK=1 shows where it came from.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from uvlm.cli_plan import app as planning
from uvlm.cli_slurm import app as slurm
from uvlm.distributed import check_local_rank, leave, prepare_environment

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data = typer.Typer(no_args_is_help=True, help="Bring a corpus into shards and give its images codes.")
tokenizer = typer.Typer(no_args_is_help=True, help="Make the tokenizers of a run.")
app.add_typer(planning)
app.add_typer(slurm)
app.add_typer(data, name="data")
app.add_typer(tokenizer, name="tokenizer")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="config keys to set, such as optim.steps=100")
]
Run = Annotated[Path, typer.Argument(help="run folder")]
Trust = Annotated[
    bool, typer.Option("--trust", help="open a checkpoint from elsewhere, which can run code of its writer")
]


@app.callback()
def root(local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None) -> None:
    """Train one transformer that understands images and generates them, with DeepSpeed, on Slurm clusters."""
    if local_rank is not None:  # DeepSpeed's launcher puts it before the command
        check_local_rank(local_rank)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder of the demo; run again to go on")] = Path("runs/demo"),
    overrides: Overrides = None,
) -> None:
    """Data to picture on this machine: real images, two ranks, ZeRO-3, about twelve minutes. Nothing to configure."""
    from uvlm.demo.stages import run_demo

    run_demo(out, overrides or [])


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML, a shipped name, or a run folder")],
    overrides: Overrides = None,
    trust: Trust = False,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="first let all ranks check nodes, data and links: seconds")
    ] = False,
) -> None:
    """Train, or go on from the newest checkpoint. Under torchrun or srun this is one rank; alone, one process.

    SIGTERM, SIGUSR2 or a file STOP in the run folder ends it after the next step with a checkpoint and exit code 75; a
    file SAVE only writes the checkpoint.
    """
    from uvlm.config import load_config
    from uvlm.train import train as run_training

    leave(run_training(load_config(config, overrides or []), trust, preflight))


@app.command()
def launch(
    config: Annotated[Path, typer.Argument(help="YAML, a shipped name, or a run folder")],
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="processes on this machine")],
    overrides: Overrides = None,
    trust: Trust = False,
) -> None:
    """The same as `train` on this machine with several processes (torchrun underneath)."""
    from uvlm.check import check
    from uvlm.config import load_config
    from uvlm.distributed import launch as start

    check(load_config(config, overrides or []), nproc)
    raise typer.Exit(start(["train", str(config), *(overrides or []), *["--trust"] * trust], nproc))


@app.command(name="eval")
def evaluate(
    run: Run, shards: Annotated[Path, typer.Option(help="folder of tokenized shards with held-out questions")]
) -> None:
    """Answer accuracy of a trained model: the share of documents whose supervised text is all right."""
    from uvlm.evaluate import evaluate as measure
    from uvlm.progress import bars

    with bars() as update:
        result = measure(run, shards, update)
    if unreadable := result["vqa_unreadable"]:
        print(f"{unreadable:,} documents could not be read or are too long; they count as wrong")
    print(f"answer accuracy {result['vqa_accuracy']:.4f} over {result['vqa_questions']:,} questions")


@app.command()
def ask(
    run: Run,
    image: Annotated[Path, typer.Argument(help="image file")],
    text: Annotated[str, typer.Argument(help="question")],
) -> None:
    """Answer a question about an image."""
    from uvlm.generate import Generator

    if not image.is_file():
        raise ValueError(f"there is no image {image}")
    print(Generator.load(run).answer(image.read_bytes(), text))


@app.command()
def generate(
    run: Run,
    text: Annotated[str, typer.Argument(help="caption, such as 'a blue circle'")],
    out: Annotated[Path, typer.Option(help="PNG to write")],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="another seed, another picture")] = 0,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest code each time")] = 0.7,
    top_k: Annotated[int, typer.Option(min=0, help="draw among the k likeliest codes; 0 among all")] = 0,
    guidance: Annotated[
        float, typer.Option(help="above 1, closer to the caption; needs images without caption in training")
    ] = 2.0,
) -> None:
    """Draw an image from a caption."""
    from PIL import Image

    from uvlm.generate import Generator
    from uvlm.pictures import check_png

    check_png(out)
    pixels = Generator.load(run).images([text], [seed], temperature, top_k, guidance)[0]
    Image.fromarray(pixels).save(out, format="PNG")
    print(out)


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="folder to write; a new one")],
    step: Annotated[
        int | None, typer.Option(min=0, help="of a checkpoint; else the finished model, or the newest checkpoint")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; else that of training. With --step, fp32 is the master copy")
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="export a model that leaves tokens out, to be run without leaving any out")
    ] = False,
    trust: Trust = False,
) -> None:
    """Write a trained model as a Hugging Face folder, with tokenizers and model card. Needs no GPU."""
    from uvlm.export import export as run_export
    from uvlm.progress import bars

    with bars() as update:
        weights = run_export(run, out, step=step, dtype=dtype, dense=dense, trust=trust, progress=update)
    print(f"model of step {weights.step}: {out}")


@data.command()
def convert(
    format_name: Annotated[
        str, typer.Argument(metavar="FORMAT", help="pairs, vqa, chat, obelics, mmc4, webdataset, text")
    ],
    source: Annotated[
        str, typer.Argument(help="file, or folder of files: .jsonl .json .csv .tsv .parquet .tar, images")
    ],
    out: Annotated[str, typer.Argument(help="folder of shards to write; run again to go on")],
    samples_per_shard: Annotated[int, typer.Option(min=1, help="documents in one tar")] = 1000,
    image_root: Annotated[Path | None, typer.Option(help="folder of the image paths; else that of the file")] = None,
    text_column: Annotated[str | None, typer.Option(help="column or field of the text or caption")] = None,
    image_column: Annotated[str | None, typer.Option(help="column or field of the image path, URL or bytes")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="tokenizer folder or Jinja file that renders conversations (chat only)")
    ] = None,
    drop_missing_images: Annotated[
        bool, typer.Option("--drop-missing-images", help="leave out an image that cannot be had, not its document")
    ] = False,
    retry_images: Annotated[
        bool, typer.Option("--retry-images", help="ask again for images that an earlier run could not have")
    ] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="worker processes; else one for each core")] = None,
) -> None:
    """Bring a corpus into canonical shards: plain webdataset tars, an index beside each, one manifest."""
    from data_pipeline.convert import convert as run_conversion
    from data_pipeline.convert.options import Options
    from uvlm.progress import counter

    options = Options(image_root, text_column, image_column, chat_template, drop_missing_images)
    with counter("converting") as update:
        report = run_conversion(
            format_name,
            source,
            out,
            options=options,
            samples_per_shard=samples_per_shard,
            num_processes=processes,
            retry_images=retry_images,
            progress=update,
        )
    _print_rejected(report.rejected, Path(out))
    for reason, count in report.left_out.items():
        print(f"left out {count:,} images: {reason}")
    if report.lacking_images:
        print(f"{report.lacking_images:,} shards were kept that lack images; --retry-images asks for these again")
    for kind, count in report.not_read.items():
        print(f"not read: {count:,} {kind}")
    print(f"{report.documents_in:,} documents in, {report.documents_out:,} out: {out}")


@data.command()
def tokenize(
    shards: Annotated[str, typer.Argument(help="folder or URL of canonical shards")],
    out: Annotated[str, typer.Argument(help="folder of tokenized shards to write; run again to go on")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer folder; its image/ makes the codes")],
    min_psnr: Annotated[float, typer.Option(help="dB that the first images must keep after a round trip")] = 18.0,
    drop_images: Annotated[
        bool, typer.Option("--drop-images", help="write codes without the images: what training reads, much smaller")
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="share the work: so many processes here, or array tasks")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="do this rank's part only; a Slurm array knows by itself")
    ] = None,
) -> None:
    """Give every image its codes, so that training never runs an image encoder."""
    from data_pipeline.tokenize import tokenize as run_tokenization
    from data_pipeline.tokenize_ranks import ranks_of_slurm
    from uvlm.progress import bars

    rank, num_ranks = ranks_of_slurm(os.environ, rank, ranks)
    with bars() as update:
        report = run_tokenization(
            shards,
            out,
            tokenizer,
            min_psnr=min_psnr,
            keep_images=not drop_images,
            rank=rank,
            num_ranks=num_ranks,
            progress=update,
        )
    _print_rejected(report.rejected, Path(out))
    print(f"{report.documents:,} documents with codes for {report.images:,} images: {out}")
    if not report.finished:
        print(f"{report.shards_missing:,} shards are still to be done by the other ranks; the last one finishes {out}")


@data.command()
def verify(
    shards: Annotated[str, typer.Argument(help="folder or URL of shards")],
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer folder, to check codes and measure lengths")] = None,
    images: Annotated[int | None, typer.Option(min=0, help="decode the images of so many documents; else all")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="worker processes; else one for each core")] = None,
) -> None:
    """Check shards before training: index, checksums, every document and image. Exit 1 where something is wrong."""
    from data_pipeline.verify import verify as run_verification
    from data_pipeline.verify_report import problems, summary
    from uvlm.progress import bars

    num_processes = processes or len(os.sched_getaffinity(0))
    with bars() as update:
        report = run_verification(
            shards, tokenizer=tokenizer, images=images, num_processes=num_processes, progress=update
        )
    print(summary(report))
    if not report.is_good:
        print(problems(report), file=sys.stderr)
        raise typer.Exit(1)


@data.command()
def show(
    shards: Annotated[str, typer.Argument(help="folder or URL of shards")],
    doc: Annotated[str, typer.Option(help="a document's number, from 0, or its key")],
    out: Annotated[Path, typer.Option(help="PNG to write")],
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer folder, to see tokens and decoded codes")] = None,
    pack_tokens: Annotated[int | None, typer.Option(min=1, help="to see how much of a pack the document fills")] = None,
    font: Annotated[Path | None, typer.Option(help="TrueType file for scripts beyond Latin")] = None,
) -> None:
    """Draw a document as the model sees it: text, images beside their decoded codes, what carries loss."""
    from data_pipeline.show import parse_document
    from data_pipeline.show import show as draw
    from uvlm.pictures import check_png

    check_png(out)
    draw(shards, parse_document(doc), out, tokenizer=tokenizer, pack_tokens=pack_tokens, font=font)
    print(out)


@tokenizer.command("train")
def tokenizer_train(
    shards: Annotated[list[Path], typer.Argument(help="folders of canonical shards")],
    out: Annotated[Path, typer.Argument(help="tokenizer folder to write; run again to go on")],
    steps: Annotated[int, typer.Option(min=1, help="updates of the image tokenizer, 16 images each")] = 2000,
) -> None:
    """Train a small image tokenizer (64x64 pixels, 64 codes) and a byte-level BPE on one's own data."""
    from data_pipeline.image_tokenizer_training import ImageTraining
    from data_pipeline.tokenizer_training import train_tokenizers
    from uvlm.progress import bars

    with bars() as update:
        train_tokenizers(shards, out, image=ImageTraining(steps=steps), progress=update)
    print(f"tokenizers: {out}")


def _print_rejected(rejected: dict[str, int], out: Path) -> None:
    for reason, count in rejected.items():
        print(f"rejected {count:,}: {reason}")
    if rejected:
        print(f"which and why: {out / 'rejected.jsonl'}")


def main() -> None:
    """Entry point of the console script."""
    prepare_environment()
    is_rank = "RANK" in os.environ
    try:
        app()
    except SystemExit as stop:
        if stop.code == 130 and not is_rank:  # typer's code for an interrupt; one of us tells it
            print("interrupted; run the same command again, what is finished is kept", file=sys.stderr)
        raise
    except (ValueError, OSError) as error:
        if os.environ.get("UVLM_TRACEBACK"):
            raise
        sys.stderr.write(f"error: {error}\n")  # in one piece: other ranks write there at the same moment
        torch_distributed = sys.modules.get("torch.distributed")
        if torch_distributed and torch_distributed.is_initialized():
            leave(1)  # the interpreter would wait for threads, and one may hang in a write that nobody needs any more
        sys.exit(1)
