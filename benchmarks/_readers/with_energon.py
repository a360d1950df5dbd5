"""Megatron-Energon as its documentation uses it: a crude webdataset, a cooker, its loader that saves and restores.

Runs in an environment that has Energon and not this project. Its `prepare` writes an index and settings beside the
shards, so the shards are linked into a folder of its own. Given what is fastest in it: members that a mode does not
need are filtered out by its settings, and documents travel from workers as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from measure import NUM_COMPARED, SHUFFLE_BUFFER, Job, answer, timed_resume
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    SampleDecoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)

SETTINGS = """\
__module__: megatron.energon
__class__: CrudeWebdataset
part_filter: [{parts}]
"""


def main() -> None:
    answer(rate, resume)


@edataclass
class Document(Sample):
    record: dict[str, Any]
    codes: list[np.ndarray]
    images: list[np.ndarray]


@stateless
def cook(sample: dict[str, Any]) -> Document:
    return Document(
        **basic_sample_keys(sample),
        record=sample["json"],
        codes=[sample["1.npy"], sample["3.npy"]],
        images=[sample[name] for name in ("1.jpg", "3.jpg") if name in sample],
    )


class Encoder(DefaultTaskEncoder):
    decoder = SampleDecoder(image_decode="rgb8")
    cookers = [Cooker(cook)]  # noqa: RUF012  # its way of declaring them

    def batch(self, samples: list[Document]) -> list[Document]:
        return samples


def prepared(job: Job) -> Path:
    """The folder that Energon reads for this mode; made where it is not there."""
    folder = Path(job.data) / f"energon-{job.mode}"
    done = folder / ".nv-meta" / "ready"
    if done.is_file():
        return folder
    from megatron.energon.tools.prepare import command

    folder.mkdir(exist_ok=True)
    for shard in Path(job.folder).glob("*.tar"):
        if not (folder / shard.name).exists():
            os.link(shard, folder / shard.name)
    options = ["--non-interactive", "--no-progress", "--force-overwrite", "--split-ratio=1,0,0", "--skip-dataset-yaml"]
    command.main([*options, "--num-workers=2", str(folder)], standalone_mode=False)
    parts = ["json", "1.npy", "3.npy"] + ["1.jpg", "3.jpg"] * (job.mode == "jpeg")
    (folder / ".nv-meta" / "dataset.yaml").write_text(SETTINGS.format(parts=", ".join(parts)))
    done.touch()
    return folder


def loader(job: Job, folder: Path, workers: int) -> Any:
    dataset = get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=None if job.batch == 1 else job.batch,
        shuffle_buffer_size=SHUFFLE_BUFFER,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
    )
    return get_savable_loader(dataset)


def rate(job: Job) -> Iterator[int]:
    for item in loader(job, prepared(job), job.workers):
        if job.batch == 1:
            check(job, item)
        yield 1 if job.batch == 1 else len(item)


def check(job: Job, document: Document) -> None:
    """That the work was done."""
    assert document.record["texts"][0]
    assert [codes.shape for codes in document.codes] == [(16, 16), (16, 16)]
    if job.mode == "jpeg":
        assert [image.shape[2] for image in document.images] == [3, 3]


def resume(job: Job) -> dict[str, Any]:
    folder = prepared(job)
    first = loader(job, folder, job.workers)
    documents = iter(first)
    for _ in range(job.stop_at):
        next(documents)
    state = first.save_state_rank()
    expected = [document.__key__ for document in islice(documents, NUM_COMPARED)]

    def continued() -> Iterator[str]:
        second = loader(job, folder, job.resume_workers)
        second.restore_state_rank(state)
        return (document.__key__ for document in second)

    return timed_resume(continued, expected)


if __name__ == "__main__":
    main()
