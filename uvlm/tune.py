"""`uvlm tune`: the fast setting of a run, found by measuring on this machine or in this Slurm allocation.

tune_space.py says what may be tried, tune_trial.py measures one setting in processes of its own, tune_search.py decides
what is measured next, tune_report.py writes down what was found. Here they meet a config. Nothing is written but OUT:

    search.json  trials.jsonl           what is searched, and every trial: the same command goes on from these
    forecasts.json                      what plan said of each setting
    trials/0007/                        config, JSON and log of a trial
    best.json  overrides.txt            the winner: the DeepSpeed JSON, and the keys of the YAML that belong to it
    report.md  tune.png                 all trials, what changed, by how much

Cost (run, the demo model, two ranks on two busy cores): 12 to 15 s a trial, of which 10 s are the start of the
processes, so that a budget of ten minutes measures some thirty.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipeline.files import replace_file
from uvlm.config import Config, dump_config
from uvlm.tune_search import Forecast, Journal, Search, Tools
from uvlm.tune_space import Lengths, Setting, Space, config_of, read_lengths, setting_of
from uvlm.tune_trial import Outcome, Place, run_trial

_PLAN_SHARE = 0.05  # of the budget


def tune(
    config: Config, place: Place, out: Path, minutes: float, gpu_memory: float | None, say: Callable[[str], None]
) -> tuple[str, Setting]:
    """Search, or go on with it, and write the winner and the report into `out`. The result in words, and the winner.

    Args:
        minutes: the budget, over all starts.
        gpu_memory: bytes of a GPU, where they are not to be those of the device.
        say: takes lines for the terminal.

    Raises:
        ValueError: the config cannot run, nothing could be measured, or `out` holds the search of something else.
    """
    from uvlm.check import check
    from uvlm.run_folder import held
    from uvlm.tune_report import verdict, write_report

    check(config, place.num_ranks)
    start = setting_of(config, place.num_ranks)
    with held(out):
        lengths = _begun(out, _identity(config, start, place), lambda: read_lengths(config))
        space = _space(config, start, lengths, place)
        warnings = _warnings(config, space, lengths)
        for warning in warnings:
            say(f"note: {warning}")
        tools = _tools(config, place, out, minutes, say)
        search = Search(space, Journal(out / "trials.jsonl"), tools, minutes * 60, gpu_memory)
        search.seed = config.seed
        winner, gain = search.run()
        replace_file(out / "best.json", json.dumps(winner.tree, indent=2) + "\n")
        replace_file(out / "overrides.txt", "\n".join(overrides(winner, out)) + "\n")
        write_report(out, search, winner, gain, warnings, versions())
    return verdict(search, winner, gain), winner


def overrides(setting: Setting, out: Path) -> list[str]:
    """`key=value` for the command line, the JSON among them."""
    return [*setting.overrides, f"deepspeed={out.absolute() / 'best.json'}"]


def command(config: str, words: Sequence[str], setting: Setting, place: Place, out: Path) -> list[str]:
    """What starts a training with this setting where it was measured, on as many ranks.

    Args:
        words: the user's `key=value`, of which those stay that the setting does not replace.
    """
    tuned = overrides(setting, out)
    keys = {word.partition("=")[0] for word in tuned}
    rest = [*(word for word in words if word.partition("=")[0] not in keys), *tuned]
    if place.in_slurm:
        return ["uvlm", "submit", config, f"--nodes={place.num_nodes}", f"--gpus-per-node={place.nproc}", *rest]
    start = ["launch", config, f"--nproc={place.nproc}"] if place.nproc > 1 else ["train", config]
    return ["uvlm", *start, *rest]


def versions() -> dict[str, str]:
    """What a measurement depends on, by name."""
    packages = {name: metadata.version(name) for name in ("torch", "deepspeed", "transformers")}
    return {"uvlm (its files)": _code(), "python": platform.python_version(), **packages}


def _code() -> str:
    """A digest of our own source files."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *(folder.parent / "data_pipeline").rglob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _identity(config: Config, start: Setting, place: Place) -> dict[str, Any]:
    """What must not change while a search goes on."""
    tree = json.loads(config.model_dump_json())
    flat = {
        f"{key}.{name}": value for key, part in tree.items() if isinstance(part, dict) for name, value in part.items()
    }
    flat |= {key: value for key, value in tree.items() if not isinstance(value, dict)}
    return {**flat, **start.flat(), "nodes": place.num_nodes, "ranks of a node": place.nproc, **versions()}


def _begun(out: Path, identity: dict[str, Any], lengths: Callable[[], Lengths]) -> Lengths:
    """What search.json says of the documents; it is written where this is the first start."""
    path = out / "search.json"
    if not path.exists():
        found = lengths()
        replace_file(path, json.dumps({"identity": identity, "documents": found}, indent=1))
        return found
    tree = json.loads(path.read_text())
    then = tree["identity"]
    identity = json.loads(json.dumps(identity))
    for key in [*identity, *then]:
        if identity.get(key) != then.get(key):
            raise ValueError(
                f"{out} holds a search of something else ({key}={then.get(key)!r} then, {identity.get(key)!r} now); "
                "give --out another folder, or remove this one"
            )
    return Lengths(*tree["documents"])


def _space(config: Config, start: Setting, lengths: Lengths, place: Place) -> Space:
    import torch

    on_gpus = torch.cuda.is_available()
    compiler = "nvcc" if on_gpus else "c++"
    cores = int(os.environ.get("SLURM_CPUS_ON_NODE", "0")) if place.in_slurm else 0
    return Space(
        start,
        num_ranks=place.num_ranks,
        min_pack_tokens=max(1, lengths.longest) if lengths.is_all else max(lengths.longest, config.data.pack_tokens),
        max_pack_tokens=config.model.max_position,
        hidden_size=config.model.hidden_size,
        num_cores=(cores or len(os.sched_getaffinity(0))) // place.nproc,
        can_build=shutil.which(compiler) is not None or (on_gpus and "CUDA_HOME" in os.environ),
        nodes_share=place.num_nodes > 1,
    )


def _warnings(config: Config, space: Space, lengths: Lengths) -> list[str]:
    """What a user should know of what is and is not searched."""
    found = []
    start = space.start
    tokens = start.pack_tokens * start.num_rows
    sizes = sorted({start.pack_tokens, *(setting.pack_tokens for setting in space.alternatives("packs", start))})
    if len(sizes) == 1:
        found.append(
            f"the {tokens:,} tokens of a step can be held by data.pack_tokens={start.pack_tokens} alone, so packs stay"
        )
    if not lengths.is_all:
        found.append(
            f"only {lengths.num_read:,} documents were read to learn their lengths, so no pack smaller than "
            f"data.pack_tokens={start.pack_tokens} is tried"
        )
    elif lengths.longest > start.pack_tokens // 2:
        found.append(
            f"packs of fewer than {lengths.longest} tokens are not tried: they would leave out documents that the "
            "start setting takes"
        )
    if lengths.num_longer and sizes[-1] > start.pack_tokens:
        found.append(
            f"{lengths.num_longer:,} of {lengths.num_read:,} documents are longer than data.pack_tokens="
            f"{start.pack_tokens}; with larger packs they would be trained on too"
        )
    if any(isinstance(source.weight, dict) for source in config.data.train):
        found.append("weights of sources change by step; trials see those of the first steps")
    return found


def _tools(config: Config, place: Place, out: Path, minutes: float, say: Callable[[str], None]) -> Tools:
    """The real ones."""
    from uvlm.check import check

    def written(setting: Setting, folder: Path, run: Path | None) -> Config:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "deepspeed.json", json.dumps(setting.tree, indent=2) + "\n")
        return config_of(setting, config, folder / "deepspeed.json", run)

    def run(setting: Setting, number: int, seconds: float, deadline: float) -> Outcome:
        folder = out / "trials" / f"{number:04d}"
        trial = written(setting, folder, folder / "run")
        replace_file(folder / "config.yaml", dump_config(trial))
        return run_trial(folder, place, seconds, deadline)

    def refusal(setting: Setting) -> str | None:
        try:
            check(written(setting, out / "considered", None), place.num_ranks)
        except ValueError as error:
            return str(error)
        return None

    return Tools(run, refusal, _forecaster(config, place, out, 60 * minutes * _PLAN_SHARE), say)


def _forecaster(
    config: Config, place: Place, out: Path, seconds: float
) -> Callable[[Setting, Outcome], Forecast | str | None]:
    """What plan says, kept in OUT/forecasts.json, so that a search that goes on sees the same; None for what was not
    asked before `seconds` had passed.

    Shapes, a sample of the data and a traced pass are made once for each size of packs; a JSON costs nothing more.
    """
    from uvlm.hardware import HARDWARE, Hardware, this_machine
    from uvlm.plan import Planner

    path, deadline = out / "forecasts.json", time.monotonic() + seconds
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    @functools.cache
    def hardware(device: str) -> Hardware | None:
        if device.startswith("CPU"):
            return this_machine(place.num_ranks)
        return next((one for name, one in HARDWARE.items() if name in device.lower()), None)

    @functools.cache
    def planner(pack_tokens: int, recompute: str, device: str) -> Planner:
        data = config.data.model_copy(update={"pack_tokens": pack_tokens})
        return Planner(config.model_copy(update={"data": data, "recompute": recompute}), hardware(device))

    def ask(setting: Setting, device: str) -> list[float] | str | None:
        chosen = hardware(device)
        if chosen is None or time.monotonic() > deadline:
            return None
        try:
            one = planner(setting.pack_tokens, setting.recompute, device)
            one = one.with_json(config_of(setting, config, config.deepspeed), setting.tree)
            plan = one.at(place.num_ranks, place.nproc)
        except ValueError as error:
            return f"refused: {error}"
        return [plan.needed + (0 if chosen.is_gpu else plan.memory.host), 1 / plan.tokens_per_second]

    def forecast(setting: Setting, first: Outcome) -> Forecast | str | None:
        if setting.fingerprint not in known:
            known[setting.fingerprint] = ask(setting, first.device)
            replace_file(path, json.dumps(known))
        found = known[setting.fingerprint]
        return Forecast(*found) if isinstance(found, list) else found

    return forecast
