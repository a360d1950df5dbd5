"""Writes the golden files."""

from tests.golden import FOLDER, scripts

for name, text in scripts().items():
    (FOLDER / name).write_text(text)
