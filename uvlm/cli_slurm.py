"""The commands that speak with Slurm: submit, submit-tokenize, submit-eval, status, stop."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from uvlm.job_script import Request
    from uvlm.submit import Submitted

app = typer.Typer()

Nodes = Annotated[int, typer.Option("--nodes", min=1, help="number of nodes")]
Gpus = Annotated[
    int, typer.Option("--gpus-per-node", min=0, help="one process for each; 0: one process a node, on its CPU")
]
Time = Annotated[
    str | None, typer.Option("--time", help="limit of one attempt, such as 24:00:00; the job comes back after it")
]
Partition = Annotated[str | None, typer.Option("--partition", help="else the cluster's default")]
Account = Annotated[str | None, typer.Option("--account", help="who pays")]
Qos = Annotated[str | None, typer.Option("--qos", help="quality of service")]
After = Annotated[
    list[str] | None, typer.Option("--after", help="number of a job that must end well first; may be repeated")
]
StopBefore = Annotated[
    int,
    typer.Option("--stop-before", min=1, max=65535, help="seconds before the limit at which the ranks save and leave"),
]
MaxRestarts = Annotated[
    int, typer.Option("--max-restarts", min=0, help="restarts after failures; those for a time limit do not count")
]
Sbatch = Annotated[
    list[str] | None, typer.Option("--sbatch", help="another option of sbatch, as --sbatch=--constraint=h100")
]
Env = Annotated[Path | None, typer.Option("--env", help="the cluster's env.sh; else that of UVLM_ENV, or slurm/env.sh")]
Apptainer = Annotated[str | None, typer.Option("--apptainer", help="image to run in, by apptainer")]
Pyxis = Annotated[str | None, typer.Option("--pyxis", help="image to run in, by pyxis and enroot")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check and print the script; make and submit nothing")]
Home = Annotated[Path, typer.Argument(metavar="RUN", help="run folder, or OUT.jobs of an array")]


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="YAML, a shipped name, or the folder of a run that is to go on")],
    nodes: Nodes,
    gpus_per_node: Gpus,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="config keys to set, such as optim.steps=100")
    ] = None,
    time: Time = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    after: After = None,
    stop_before: StopBefore = 300,
    step_seconds: Annotated[
        float | None, typer.Option(min=0, help="what a step takes, to check --time; else as this run has measured")
    ] = None,
    max_restarts: MaxRestarts = 50,
    sbatch: Sbatch = None,
    env: Env = None,
    apptainer: Apptainer = None,
    pyxis: Pyxis = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="open a checkpoint from elsewhere, which can run code of its writer")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="first let some ranks take two steps here, each alone: a minute")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Check a training, put it into Slurm's queue, and have it come back by itself until it is done."""
    from uvlm.submit import submit_training

    request, env_file = _request(
        env=env,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        after=after,
        stop_before=stop_before,
        max_restarts=max_restarts,
        sbatch=sbatch,
        apptainer=apptainer,
        pyxis=pyxis,
    )
    words = overrides or []
    done = submit_training(
        config, words, request, env_file, step_seconds=step_seconds, trust=trust, rehearse=rehearse, dry_run=dry_run
    )
    _show(done, request)
    if not dry_run:
        home = shlex.quote(str(done.home))
        print(f"        tail -F {home}/logs/rank_0.log\n        tensorboard --logdir {home}/tensorboard")


@app.command("submit-tokenize")
def submit_tokenize(
    shards: Annotated[str, typer.Argument(help="folder or URL of canonical shards")],
    out: Annotated[Path, typer.Argument(help="folder of tokenized shards to write; logs go to OUT.jobs")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer folder; its image/ makes the codes")],
    tasks: Annotated[int, typer.Option(min=1, help="tasks of the job array, each with its share of the shards")],
    min_psnr: Annotated[float, typer.Option(help="dB that the first images must keep after a round trip")] = 18.0,
    drop_images: Annotated[bool, typer.Option("--drop-images", help="write codes without the images")] = False,
    gpus_per_node: Annotated[
        int, typer.Option("--gpus-per-node", min=0, max=1, help="of each task; 0 works on its CPU")
    ] = 1,
    time: Time = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    after: After = None,
    max_restarts: MaxRestarts = 10,
    sbatch: Sbatch = None,
    env: Env = None,
    apptainer: Apptainer = None,
    pyxis: Pyxis = None,
    dry_run: DryRun = False,
) -> None:
    """Put `uvlm data tokenize` into Slurm's queue as a job array; tasks that fail come back and keep what they have."""
    from uvlm.submit import submit_tokenizing

    request, env_file = _request(
        env=env,
        nodes=1,
        gpus_per_node=gpus_per_node,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        after=after,
        stop_before=60,
        max_restarts=max_restarts,
        sbatch=sbatch,
        apptainer=apptainer,
        pyxis=pyxis,
    )
    options = [f"--min-psnr={min_psnr}", *["--drop-images"] * drop_images]
    done = submit_tokenizing(shards, out, tokenizer, options, tasks, request, env_file, dry_run=dry_run)
    _show(done, request)


@app.command("submit-eval")
def submit_eval(
    run: Annotated[Path, typer.Argument(help="run folder")],
    shards: Annotated[Path, typer.Option(help="folder of tokenized shards with held-out questions")],
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=0, max=1, help="0 works on a CPU")] = 1,
    time: Time = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    after: After = None,
    sbatch: Sbatch = None,
    env: Env = None,
    apptainer: Apptainer = None,
    pyxis: Pyxis = None,
    dry_run: DryRun = False,
) -> None:
    """Put `uvlm eval RUN` into Slurm's queue, after its training by --after."""
    from uvlm.submit import submit_evaluation

    request, env_file = _request(
        env=env,
        nodes=1,
        gpus_per_node=gpus_per_node,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        after=after,
        stop_before=60,
        max_restarts=3,
        sbatch=sbatch,
        apptainer=apptainer,
        pyxis=pyxis,
    )
    _show(submit_evaluation(run, shards, request, env_file, dry_run=dry_run), request)


@app.command()
def status(run: Home) -> None:
    """Where a submitted run stands: its jobs, the last step, the last checkpoint, what happened."""
    from uvlm.job_status import status as lines

    print("\n".join(lines(run.absolute())))


@app.command()
def stop(
    run: Home,
    now: Annotated[bool, typer.Option("--now", help="do not wait for a checkpoint")] = False,
) -> None:
    """End a run: after its current step, with a checkpoint. `uvlm submit RUN` goes on."""
    from uvlm.job_status import stop as ask

    print("\n".join(ask(run.absolute(), now)))


def _request(
    *,
    env: Path | None,
    nodes: int,
    gpus_per_node: int,
    time: str | None,
    partition: str | None,
    account: str | None,
    qos: str | None,
    after: list[str] | None,
    stop_before: int,
    max_restarts: int,
    sbatch: list[str] | None,
    apptainer: str | None,
    pyxis: str | None,
) -> tuple[Request, Path]:
    """The request, with what env.sh sets for what was not given, and the env.sh."""
    from uvlm.job_script import Request
    from uvlm.slurm_commands import env_options, find_env

    if apptainer and pyxis:
        raise ValueError("--apptainer and --pyxis are two ways into an image; give one of them")
    env_file = find_env(env)
    given = {"time": time, "partition": partition, "account": account, "qos": qos}
    options = env_options(env_file) | {name: value for name, value in given.items() if value is not None}
    request = Request(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        **{name: options.pop(name, None) for name in given},
        stop_before=stop_before,
        max_restarts=max_restarts,
        after=after or [],
        container="apptainer" if apptainer else "pyxis" if pyxis else "none",
        image=apptainer or pyxis or "",
        others=[*(f"--{name}={value}" for name, value in options.items()), *(sbatch or [])],
    )
    return request, env_file


def _show(done: Submitted, request: Request) -> None:
    if done.warning:
        print(f"warning: {done.warning}", file=sys.stderr)
    if not done.job:
        print(done.script, end="")
        return
    limit = request.time or "that of the partition"
    print(
        f"job {done.job} is in the queue: {request.nodes} node(s), {request.world_size} process(es), folder "
        f"{done.home}\nSlurm expects it to start at {done.expected_start}; time limit: {limit}"
    )
    home = shlex.quote(str(done.home))
    print(f"stop:   uvlm stop {home}\nwatch:  uvlm status {home}")
