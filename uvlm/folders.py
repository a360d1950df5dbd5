"""What a folder is, asked without any import that costs time."""

from __future__ import annotations

from pathlib import Path


def is_run_folder(folder: Path) -> bool:
    """Whether it is what `uvlm train` or `uvlm submit` makes, not just a folder with a config.yaml."""
    return (folder / "config.yaml").is_file() and (folder / "environment.txt").is_file()
