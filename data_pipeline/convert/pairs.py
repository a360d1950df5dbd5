"""Format `pairs`: images with captions, for learning to generate.

    {"image": "path.png", "caption": "a blue rectangle"}          a line of .jsonl; or csv, tsv, json, parquet
    0001.jpg 0001.txt (or 0001.json with a caption)               files of a folder, members of a webdataset tar

A document is the caption, then the image, which carries the loss. Columns go by their usual names (`fields.py`) or by
`--image-column` and `--text-column`, which covers published text-to-image sets such as JourneyDB ("img_path" and
"prompt") and LAION's ("URL" and "TEXT"). `"caption": null` is an image alone: from a few of these a model learns what
images look like without a caption, which classifier-free guidance needs.
"""

from __future__ import annotations

from typing import Any

from data_pipeline.convert.draft import Draft
from data_pipeline.convert.fields import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    caption_of,
    image_of,
    record_id,
    require_column,
)
from data_pipeline.convert.options import Options
from data_pipeline.schema import Rejected

CONTAINERS = ("jsonl", "json", "csv", "parquet", "tar", "folder")


def check_columns(columns: list[str], options: Options) -> None:
    """ValueError where a table has no column for the image or none for the caption."""
    require_column(columns, IMAGE_COLUMNS, options.image_column, "image")
    require_column(columns, (*CAPTION_COLUMNS, "json"), options.text_column, "text")


def draft(key: str, record: dict[str, Any], options: Options) -> Draft | Rejected:
    caption = caption_of(key, record, options.text_column)
    if isinstance(caption, Rejected):
        return caption
    image = image_of(key, record, options.image_column)
    if isinstance(image, Rejected):
        return image
    meta = record_id(record)
    if caption is None:
        return Draft(texts=(None,), images=(image,), task="generate", loss=(True,), meta=meta)
    return Draft(texts=(caption, None), images=(None, image), task="generate", loss=(False, True), meta=meta)
