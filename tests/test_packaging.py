"""What a user gets: the wheel, its dependencies, the constraints, the Makefile. No network; a few seconds."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins() -> dict[str, str]:
    """constraints.txt as name -> version."""
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout, built by the build backend that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    pytest.importorskip("hatchling", reason="no hatchling here; it comes with the test extra")
    subprocess.run([sys.executable, "-c", build, folder], cwd=REPOSITORY, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_an_installed_uvlm_can_submit_and_has_every_ds_config(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for folder in ("ds_configs", "slurm"):
        shipped = {f"uvlm/{folder}/{path.name}" for path in (REPOSITORY / folder).iterdir() if path.is_file()}
        assert shipped
        assert shipped <= names
        assert all(wheel.read(name) == (REPOSITORY / name.removeprefix("uvlm/")).read_bytes() for name in shipped)


def test_the_wheel_holds_all_code_and_puts_nothing_else_beside_it(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    top = {name.partition("/")[0] for name in names}
    assert top == {"uvlm", "data_pipeline", f"uvlm-{PROJECT['version']}.dist-info"}
    for package in ("uvlm", "data_pipeline"):
        files = [path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / package).rglob("*.py")]
        assert set(files) <= set(names)
    yaml_files = [path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "uvlm").rglob("*.yaml")]
    assert set(yaml_files) <= set(names)


def test_the_wheel_has_the_uvlm_command_and_the_license(wheel: zipfile.ZipFile) -> None:
    info = f"uvlm-{PROJECT['version']}.dist-info"
    assert "uvlm = uvlm.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert b"The uvlm authors" in wheel.read(f"{info}/licenses/LICENSE")


def test_dependencies_are_ranges() -> None:
    for text in [*PROJECT["dependencies"], *EXTRAS["demo"], *EXTRAS["test"], *EXTRAS["gpu"]]:
        assert [clause.operator for clause in Requirement(text).specifier] == [">="], text


def test_every_pin_is_exact_public_and_within_the_range() -> None:
    pinned = pins()
    for name, version in pinned.items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{name}: a pin is one plain version, got {version!r}"
    for text in [*PROJECT["dependencies"], *EXTRAS["demo"], *EXTRAS["test"]]:
        requirement = Requirement(text)
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def test_everything_installed_for_the_project_is_pinned() -> None:
    """Walks the installed dependencies from ours, so a new one without a pin shows itself here, not in a user's log."""
    todo = [*PROJECT["dependencies"], *EXTRAS["demo"], *EXTRAS["test"]]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = Requirement(todo.pop())
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            wanted = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in wanted:
            marker = Requirement(text).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
                todo.append(text)
    assert {name for name, _ in seen} <= set(pins())


def make(folder: Path, *arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    """Runs make on a copy of the Makefile in an empty folder, with the given PATH alone."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, folder)
    program = shutil.which("make")
    if program is None:
        pytest.skip("no make here")
    return subprocess.run(
        [program, *arguments], cwd=folder, env={"PATH": path}, capture_output=True, text=True, timeout=60
    )


def tools(folder: Path, *names: str) -> str:
    """A PATH folder that holds these tools and no other."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(shutil.which(name) or f"/usr/bin/{name}")
    return str(folder)


def test_set_up_without_python_says_what_is_missing(tmp_path: Path) -> None:
    done = make(tmp_path, "demo", path=tools(tmp_path / "tools", "sh", "bash", "grep", "find"))
    assert done.returncode != 0
    assert "uvlm needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_set_up_without_compiler_says_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "tools"
    path = tools(folder, "sh", "bash", "grep", "find")
    (folder / "python3").symlink_to(sys.executable)
    done = make(tmp_path, "test", path=path)
    assert done.returncode != 0
    assert "uvlm needs a C++ compiler" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_help_lists_every_target(tmp_path: Path) -> None:
    shown = make(tmp_path, "help", path="/usr/local/bin:/usr/bin:/bin").stdout
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r"^  make (\S+)", shown, re.MULTILINE) == targets.split()


def test_torch_is_fixed_before_anything_else_is_installed(tmp_path: Path) -> None:
    planned = make(tmp_path, "--dry-run", "demo", path="/usr/local/bin:/usr/bin:/bin").stdout
    first, second = re.findall(r"pip install .*", planned)
    assert first.split()[-1] == f"torch=={pins()['torch']}"
    assert second.endswith("-c constraints.txt -e '.[demo,test]'")


def test_shell_files_pass_shellcheck() -> None:
    """All there are, golden files of batch scripts included; what git does not know yet, too."""
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here; on Debian: apt-get install shellcheck")
    folders = ("slurm", "tests", "uvlm", "data_pipeline", "benchmarks", "docs")
    found = [
        path for folder in folders for path in (REPOSITORY / folder).rglob("*") if path.suffix in (".sh", ".sbatch")
    ]
    files = [REPOSITORY / ".ci" / "run", *REPOSITORY.glob("*.sh"), *found]
    names = {path.relative_to(REPOSITORY).as_posix() for path in files}
    assert names >= {"slurm/env.sh", "tests/slurm_cluster.sh", "tests/golden/train_bare.sbatch"}
    checked = subprocess.run(["shellcheck", "-x", *files], cwd=REPOSITORY, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")
