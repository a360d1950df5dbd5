"""Foreign data into our shards; `convert` in `conversion.py` is the entry."""

from data_pipeline.convert.conversion import FORMATS, ConvertReport, convert
from data_pipeline.convert.options import Options

__all__ = ["FORMATS", "ConvertReport", "Options", "convert"]
