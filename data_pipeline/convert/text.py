"""Format `text`: documents without images, one text each, loss on all of it.

{"text": "..."}     a line of .jsonl; or a row of csv, tsv, json, parquet; column `text`, `content` or --text-column
"""

from __future__ import annotations

from typing import Any

from data_pipeline.convert.draft import Draft
from data_pipeline.convert.fields import TEXT_COLUMNS, is_encodable, present, record_id, require_column
from data_pipeline.convert.options import Options
from data_pipeline.schema import Rejected

CONTAINERS = ("jsonl", "json", "csv", "parquet")


def check_columns(columns: list[str], options: Options) -> None:
    """ValueError where a table has no column of text."""
    require_column(columns, TEXT_COLUMNS, options.text_column, "text")


def draft(key: str, record: dict[str, Any], options: Options) -> Draft | Rejected:
    text = next((record[name] for name in present(record, TEXT_COLUMNS, options.text_column)), None)
    if not isinstance(text, str) or not text.strip() or not is_encodable(text):
        return Rejected(key, "text is missing or empty")
    return Draft(texts=(text,), images=(None,), task="text", meta=record_id(record))
