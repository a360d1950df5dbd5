"""One door each: which module may import what, read from the source of every file (nothing is imported here).

The doors keep hardware and engine replaceable: a change of DeepSpeed or of flash-attn touches one file, and the data
pipeline can be used, and tested, without the trainer.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# package that is imported -> the only files that may; tests are held to nothing
DOORS = {
    # To run it, to ask which keys it knows, and to rehearse a rank of it.
    "deepspeed": {"uvlm/engine.py", "uvlm/deepspeed_schema.py", "uvlm/deepspeed_alone.py"},
    "flash_attn": {"uvlm/attention.py"},
    "liger_kernel": {"uvlm/backbone.py"},
}


def imported_packages(source: str) -> set[str]:
    """The top-level packages that a module imports anywhere in it, by `import`, `from` or `import_module("name")`."""
    packages = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            packages |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add(node.module or "")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__", "importorskip"):
                packages.add(str(node.args[0].value))
    return {package.partition(".")[0] for package in packages}


def product_files() -> Iterator[str]:
    """Every Python file of the product, relative to the root."""
    for folder in ("uvlm", "data_pipeline", "benchmarks"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            yield path.relative_to(REPOSITORY).as_posix()


def imports_of(file: str) -> set[str]:
    return imported_packages((REPOSITORY / file).read_text())


@pytest.mark.parametrize(("package", "doors"), DOORS.items())
def test_only_the_doors_import_the_package(package: str, doors: set[str]) -> None:
    assert {file for file in product_files() if package in imports_of(file)} == doors


def test_the_data_pipeline_never_imports_the_trainer() -> None:
    files = [file for file in product_files() if file.startswith("data_pipeline/")]
    assert files
    assert [file for file in files if "uvlm" in imports_of(file)] == []


def test_the_product_never_imports_its_tests() -> None:
    assert [file for file in product_files() if imports_of(file) & {"tests", "conftest", "pytest"}] == []


@pytest.mark.parametrize(
    "source",
    [
        "import deepspeed",
        "import os, deepspeed.comm as dist",
        "from deepspeed.ops import adam",
        "def late():\n    from deepspeed import zero",
        "import importlib\nimportlib.import_module('deepspeed.zero')",
        "__import__('deepspeed')",
    ],
)
def test_no_way_of_importing_escapes_the_check(source: str) -> None:
    assert "deepspeed" in imported_packages(source)


def test_a_relative_import_or_a_mere_mention_is_no_import() -> None:
    assert imported_packages("from . import deepspeed\nname = 'deepspeed'  # import deepspeed") == set()
