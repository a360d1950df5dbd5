"""The batch script of a job: what is asked of Slurm, and the templates of slurm/ filled with it.

No value reaches the shell as it is: whatever a template prints goes through `shlex.quote`, constants too, so a template
cannot forget it. Lines that begin with #SBATCH are read by sbatch, which understands the same quotes (run, Slurm 22.05)
but takes a backslash as an escape even inside of them, and a line's end as the end: both are refused there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2

Container = Literal["none", "apptainer", "pyxis"]


class Request(NamedTuple):
    """What is asked of Slurm.

    Args:
        gpus_per_node: one process for each; 0 asks for none and starts one process on each node.
        time: the limit in Slurm's words, such as 24:00:00 or 2-12; None leaves it to the partition.
        stop_before: seconds before the limit at which ranks are told to save and leave.
        after: jobs that must have ended well before this one starts.
        container, image: what the processes run in.
        others: further options of sbatch as typed, such as --constraint=h100.
    """

    nodes: int
    gpus_per_node: int
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    stop_before: int = 300
    max_restarts: int = 50
    after: Sequence[str] = ()
    container: Container = "none"
    image: str = ""
    others: Sequence[str] = ()

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node


def template_folder() -> Path:
    """Where slurm/ lies: inside an installed package, beside it in a clone."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "slurm", package.parent / "slurm") if folder.is_dir())


def render(
    template: str,
    request: Request,
    *,
    name: str,
    home: Path,
    folder: Path,
    command: Sequence[str],
    array: int | None = None,
) -> str:
    """The script as text.

    Args:
        template: file in slurm/.
        name: the job's name.
        home: holds logs/ and jobs/, and STOP where the work is to end.
        folder: that of this submission, with env.sh and code/.
        command: program and arguments of each task.
        array: number of tasks of a job array.

    Raises:
        ValueError: a value that sbatch would not read as it is.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_folder()),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: shlex.quote(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="<!--",  # {# is the length of a variable to bash
        comment_end_string="-->",
    )
    lines = _options(request, name, home, array)
    for line in lines:
        check_option(line)
    bare = request.container == "none"
    if wrong := re.search(":" if bare else "[,:]", str(home)):
        what = "the folders of PYTHONPATH" if bare else "the mounts of a container"
        raise ValueError(f"{home} holds a {wrong[0]!r}, which separates {what}; rename the folder")
    values: Mapping[str, Any] = {
        "options": lines,
        "home": home,
        "folder": folder,
        "max_restarts": request.max_restarts,
        "stop_before": request.stop_before,
        "tasks_per_node": request.tasks_per_node,
        "command": command,
        "container": request.container,
        "image": request.image,
    }
    return environment.get_template(template).render(values)


def _options(request: Request, name: str, home: Path, array: int | None) -> list[str]:
    """The options of sbatch, as --name=value."""
    # Slurm fills in %j and its kin; a % of the path itself is doubled.
    log = str(home / "logs" / "job_").replace("%", "%%") + ("%j.log" if array is None else "%A_%a.log")
    options = {
        "job-name": name,
        "nodes": request.nodes,
        "ntasks-per-node": request.tasks_per_node,
        "gpus-per-node": request.gpus_per_node or None,
        "time": request.time,
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "array": None if array is None else f"0-{array - 1}",
        "dependency": "afterok:" + ":".join(request.after) if request.after else None,
        "output": log,
        "open-mode": "append",  # the attempts of a job share the file
        "signal": f"B:USR2@{request.stop_before}",
    }
    for line in request.others:
        if (key := line.removeprefix("--").partition("=")[0]) in {
            *options,
            "export",
            "gpus",
            "no-requeue",
            "ntasks",
            "requeue",
            "wait",
        }:
            raise ValueError(f"--sbatch={line} sets --{key}, which uvlm decides itself; leave it out")
    lines = [f"--{key}={value}" for key, value in options.items() if value is not None]
    return [*lines, "--requeue", *request.others]


def check_option(line: str) -> None:
    """ValueError where sbatch would not read this option of a script as it was meant."""
    if wrong := re.search(r"[\\\x00-\x1f\x7f]", line):
        raise ValueError(f"{line!r} holds {wrong[0]!r}, which sbatch cannot be given in a script; leave it out")
    if not line.startswith("--"):
        raise ValueError(f"{line!r} is no long option of sbatch; write it as --name=value, such as --constraint=h100")


def seconds(time: str) -> float:
    """Slurm's notation of a time limit in seconds; ValueError where it is none.

    UNLIMITED or infinite,
    minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.
    """
    if time.lower() in ("unlimited", "infinite"):
        return float("inf")
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        raise ValueError(
            f"--time {time} is no time limit; write hours:minutes:seconds, such as 24:00:00, or days-hours"
        )
    days, *parts = match.groups()
    first, *rest = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, left = [first, *rest, 0, 0][:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + left
    if len(rest) == 2:
        return first * 3600 + rest[0] * 60 + rest[1]
    return first * 60 + sum(rest)
