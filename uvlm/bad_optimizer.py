"""Whether DeepSpeed could make the optimizer of its JSON with what the YAML gives it, and take it under ZeRO."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator

from uvlm import deepspeed_schema as schema
from uvlm.finding import Finding
from uvlm.known_bad import Facts, torch_adam

_DEEPSPEED = "https://github.com/deepspeedai/DeepSpeed/"
_OWNED = {"lr": "learning_rate", "betas": "betas", "eps": "eps", "weight_decay": "weight_decay"}


def bad_optimizer(facts: Facts) -> Iterator[Finding]:
    """Errors of `optimizer.type` and `optimizer.params` of a complete config."""
    name = str(facts.tree["optimizer"]["type"])
    if reason := _cannot_be_made(name, facts):
        sentence, reference = reason
        yield Finding("error", "optimizer.type", f"optimizer.type={name!r} {sentence}", reference)
        return
    yield from _bad_params(name, facts)
    is_tested = name.lower() in ("adam", "adamw", "adagrad", "lion")
    if not is_tested and not facts.tree.get("zero_allow_untested_optimizer"):
        sentence = (
            f"optimizer.type={name!r} was not tested under ZeRO, so DeepSpeed refuses it; "
            "use AdamW, or set zero_allow_untested_optimizer to true"
        )
        yield Finding("error", "optimizer.type", sentence, _DEEPSPEED + "pull/173")


def _cannot_be_made(name: str, facts: Facts) -> tuple[str, str] | None:
    """(clause with a remedy, reference)"""
    own, types = name.lower(), schema.optimizer_types()
    if own not in types and name not in types:
        usable = ["AdamW", "Adam", "NAdam", "RAdam", "Adamax"]
        nearest = difflib.get_close_matches(name, usable, n=1, cutoff=0.5) or ["AdamW"]
        return f"is unknown to DeepSpeed; use {nearest[0]}", _DEEPSPEED + "issues/5046"
    if own in ("muadam", "muadamw", "musgd") and importlib.util.find_spec("mup") is None:
        return "needs the package mup; install it, or use AdamW", "run"
    if own == "muon":
        return "cannot go with zero_optimization.reduce_scatter, and uvlm has not been run with it; use AdamW", "run"
    if own == "lamb" and (facts.config.dtype != "fp16" or not facts.on_gpus):
        return "works with dtype=fp16 on GPUs only; use AdamW", _DEEPSPEED + "issues/1217"
    return None


def _bad_params(name: str, facts: Facts) -> Iterator[Finding]:
    on_host = facts.device("optimizer") != "none"
    takes = schema.optimizer_params(name, torch_adam=torch_adam(facts), on_host=on_host)
    if takes is None:
        return
    for param in facts.tree["optimizer"]["params"]:
        if param in takes:
            continue
        if owned := _OWNED.get(param):
            sentence = f"optimizer.type={name!r} takes no {param}, which the YAML gives it as optim.{owned}; use AdamW"
            yield Finding("error", "optimizer.type", sentence, "run")
            continue
        key, nearest = f"optimizer.params.{param}", difflib.get_close_matches(param, takes, n=1, cutoff=0.0)[0]
        sentence = f"unknown key {key!r} for {name}; the nearest known one is 'optimizer.params.{nearest}'"
        yield Finding("error", key, sentence, "run")
