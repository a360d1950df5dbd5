"""The batch scripts as they are rendered for fixed requests, so that a change of a template is seen in full.

python -m tests.golden        # in the root of the repository: writes them anew; look at the difference
"""

from pathlib import Path

from uvlm.job_script import Container, Request, render

FOLDER = Path(__file__).parent


def scripts() -> dict[str, str]:
    """The text of each golden file, by its name."""
    run = Path("/runs/my run")
    training = Request(
        nodes=2, gpus_per_node=8, time="24:00:00", partition="gpu", account="my project", others=["--constraint=h100"]
    )
    train = ["/venv/my python", "-m", "uvlm", "train", "/runs/my run/jobs/001/config.yaml", "--preflight"]
    images: dict[str, tuple[Container, str]] = {
        "train_bare": ("none", ""),
        "train_apptainer": ("apptainer", "/images/my image.sif"),
        "train_pyxis": ("pyxis", "registry#uvlm:1"),
    }
    found = {
        f"{name}.sbatch": render(
            "train.sbatch.j2",
            training._replace(container=container, image=image),
            name="train my run",
            home=run,
            folder=run / "jobs" / "001",
            command=train,
        )
        for name, (container, image) in images.items()
    }
    shards = Path("/data/bob's shards.jobs")
    found["tokenize.sbatch"] = render(
        "tokenize.sbatch.j2",
        Request(nodes=1, gpus_per_node=1, stop_before=60, max_restarts=10),
        name="tokenize bob's shards.jobs",
        home=shards,
        folder=shards / "jobs" / "001",
        command=["/venv/python", "-m", "uvlm", "data", "tokenize", "/data/raw; x", "/data/bob's shards"],
        array=4,
    )
    found["eval.sbatch"] = render(
        "eval.sbatch.j2",
        Request(nodes=1, gpus_per_node=0, stop_before=60, max_restarts=3, after=["41", "42"]),
        name="eval my run",
        home=run,
        folder=run / "jobs" / "002",
        command=["/venv/python", "-m", "uvlm", "eval", "/runs/my run", "--shards=/data/held out"],
    )
    return found
