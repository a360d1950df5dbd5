"""The rendered batch script: what sbatch and bash read in it is what was given, or it is refused."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import golden
from tests.fake_slurm import DEADLINE, REQUEST, script_of
from uvlm.job_script import seconds

WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


def options_of(script: str) -> list[str]:
    """What sbatch reads: it understands the quotes of a shell (seen with Slurm 22.05)."""
    lines = [line.removeprefix("#SBATCH ") for line in script.split("\n") if line.startswith("#SBATCH ")]
    words = [shlex.split(line) for line in lines]
    assert all(len(line) == 1 for line in words), words
    return [line[0] for line in words]


@pytest.mark.parametrize("name", golden.scripts())
def test_the_rendered_scripts_are_the_golden_files(name: str) -> None:
    written = (golden.FOLDER / name).read_text()
    remedy = "if this change is meant, run `python -m tests.golden` in the root of the repository and look at its diff"
    assert golden.scripts()[name].splitlines() == written.splitlines(), remedy


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in golden.FOLDER.glob("*.sbatch")} == set(golden.scripts())


@settings(max_examples=100, deadline=None)
@given(command=st.lists(WORDS, max_size=4), image=WORDS.filter(bool), folder=WORDS)
def test_bash_reads_each_value_as_it_was_given(command: list[str], image: str, folder: str) -> None:
    request = REQUEST._replace(container="pyxis", image=image)
    script = script_of(Path("/runs"), request=request, folder=Path("/runs/" + folder), command=command)
    values = script[: script.index("\nsay()")] + '\nprintf "%s\\0" "$folder" "$image" "${command[@]}"'
    environment = {"SLURM_JOB_ID": "42"}
    done = subprocess.run(["bash", "-c", values], env=environment, capture_output=True, timeout=DEADLINE, check=True)
    shown = done.stdout.decode().split("\0")[:-1]
    assert shown == [str(Path("/runs/" + folder)), image, *command]
    assert done.stderr == b""


@settings(max_examples=100, deadline=None)
@given(name=WORDS, partition=WORDS, folder=WORDS)
@example(name='50% "it\'s" # `$(x)` *', partition="--a,b=c", folder="50 %j%%")
def test_sbatch_reads_each_option_as_it_was_given_or_it_is_refused(name: str, partition: str, folder: str) -> None:
    home = Path("/runs/" + folder)
    try:
        script = script_of(home, name=name, request=REQUEST._replace(partition=partition))
    except ValueError as refusal:
        assert "\n" not in str(refusal)  # noqa: PT017
        assert any(c < " " or c in "\\\x7f:" for c in name + partition + folder)
        return
    options = options_of(script)
    assert f"--job-name={name}" in options
    assert f"--partition={partition}" in options
    assert [o for o in options if o.startswith("--output=")] == [
        f"--output={home}/logs/job_".replace("%", "%%") + "%j.log"
    ]


@pytest.mark.parametrize("wrong", ["a\nb", "back\\slash", "bell\a"])
@pytest.mark.parametrize("place", ["home", "name", "partition", "account", "qos", "others"])
def test_what_sbatch_cannot_read_is_refused_in_one_sentence(place: str, wrong: str) -> None:
    request, name, home = REQUEST, "name", Path("/runs/a")
    if place == "home":
        home = Path("/runs") / wrong
    elif place == "name":
        name = wrong
    elif place == "others":
        request = request._replace(others=[f"--comment={wrong}"])
    else:
        request = request._replace(**{place: wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="which sbatch cannot be given in a script; leave it out") as refusal:
        script_of(home, name=name, request=request)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("option", ["-C h100", "h100", "", "; touch x"])
def test_a_further_option_that_is_no_long_one_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match="is no long option of sbatch; write it as --name=value"):
        script_of(Path("/runs/a"), request=REQUEST._replace(others=[option]))


@pytest.mark.parametrize(
    "option",
    [
        "--nodes=3",
        "--ntasks=8",
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        "--array=0-9",
        "--time=1",
        "--dependency=singleton",
        "--output=/tmp/log",
        "--open-mode=truncate",
        "--signal=USR1",
        "--requeue",
        "--no-requeue",
        "--wait",
    ],
)
def test_a_further_option_that_is_not_the_users_to_set_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^--sbatch={option} sets --[a-z-]+, which uvlm decides itself; leave it ou"):
        script_of(Path("/runs/a"), request=REQUEST._replace(others=[option]))
    script_of(Path("/runs/a"), request=REQUEST._replace(others=["--nodelist=n1", "--wait-all-nodes=1"]))


@pytest.mark.parametrize(("folder", "container"), [("a,b", "apptainer"), ("a:b", "pyxis"), ("a,b", "pyxis")])
def test_a_run_folder_that_splits_the_mounts_of_a_container_is_refused(folder: str, container: str) -> None:
    request = REQUEST._replace(container=container, image="i")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"separates the mounts of a container; rename the folder"):
        script_of(Path("/runs") / folder, request=request)


def test_a_run_folder_that_splits_PYTHONPATH_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a ':', which separates the folders of PYTHONPATH; rename the folder"):
        script_of(Path("/runs/10:30"))
    script_of(Path("/runs/a,b"))


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("1:02:03", 3723),
        ("24:00:00", 86400),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("2-12:30:15", 217815),
        ("0", 0),
        ("UNLIMITED", float("inf")),
        ("infinite", float("inf")),
    ],
)
def test_every_notation_of_a_time_limit_is_understood(time: str, expected: float) -> None:
    assert seconds(time) == expected


@pytest.mark.parametrize("time", ["", "1h", "1:2:3:4", "1-", "-1", "1-2-3", "1:", "12:00 ", "1.5", "1\n", "unlimited1"])
def test_what_is_no_time_limit_is_refused(time: str) -> None:
    with pytest.raises(ValueError, match="is no time limit; write hours:minutes:seconds, such as 24:00:00"):
        seconds(time)
