"""One rank of a rehearsal: the real code of a real rank, alone in a process, with a group that moves nothing.

PyTorch's fake process group returns at once from every collective; what should come from other ranks is this rank's own
values, so others seem to hold what it holds. Weights gathered under ZeRO-3 are therefore this rank's shard over and
over, and every number that depends on them means nothing. Shapes, memory and the order of calls are those of the job.

Collectives are seen where torch dispatches them (`c10d::...`), below torch.distributed and deepspeed.comm, so none
escapes, coalesced gathers included. Each is written down with the module in whose forward or backward it was issued.

    RANK=517 WORLD_SIZE=1024 ... python -m uvlm.rehearsal_rank CONFIG.yaml DEEPSPEED.json STEPS RESULT.json

Started by rehearse.py, which sets the place in the environment and reads RESULT.json: `Result` as an object, also where
the rank failed, up to there.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from uvlm.distributed import leave, prepare_environment, world

if __name__ == "__main__":
    prepare_environment()  # before torch is imported

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.packing import Pack
from data_pipeline.schema import TASKS
from data_pipeline.vocab import Vocab
from uvlm import checkpoint, train
from uvlm import engine as deepspeed_engine
from uvlm.config import Config, load_config
from uvlm.deepspeed_alone import state_tensors, watch_updates, without_others
from uvlm.deepspeed_config import zero_stage
from uvlm.flops import Widths
from uvlm.live_memory import LiveMemory
from uvlm.model import UnifiedVLM
from uvlm.rehearse import Call, Collective, Result
from uvlm.resident import peak_resident_bytes
from uvlm.trainer import Trainer
from uvlm.watchdog import Phase

_REDUCTIONS = ("allreduce", "reduce", "reduce_scatter", "reduce_scatter_base", "reduce_scatter_tensor_coalesced")


class Recorder(TorchDispatchMode):
    """Writes down the collectives that are issued while it is entered, in `collectives`, and what a watched model does,
    in `calls`.

    `step` counts from 1, 0 is the start; it and `phase` are set from outside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self.calls: list[Call] = []
        self.step, self.phase = 0, "build"
        self._inside: list[str] = []  # modules whose forward runs, the innermost last
        self._backward = ""  # the module that the backward pass is at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        operation = func._schema.name.removeprefix("c10d::").strip("_")
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        group = dist.ProcessGroup.unbox(named["process_group"])
        given = [value for name, value in named.items() if name.startswith("input")] or list(args[:1])
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
        self.note(operation, tensors, group.size())
        result = func(*args, **(kwargs or {}))
        if operation in _REDUCTIONS:
            _make_finite(tree_leaves(args[0]))
        return result

    def note(self, operation: str, tensors: list[torch.Tensor], group_size: int) -> None:
        """Write one down. `tensors`: what this rank gives to it."""
        module = self._inside[-1] if self._inside else self._backward if self.phase == "backward" else ""
        dtypes = "+".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))
        elements = tuple(tensor.numel() for tensor in tensors)
        self.collectives.append(Collective(operation, dtypes, elements, group_size, self.step, self.phase, module))

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """What is issued inside belongs to this phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def watch(self, model: nn.Module) -> None:
        """Name the modules of this model; call it when DeepSpeed has put its own hooks there."""
        for name, module in model.named_modules():
            shown = name or "the model itself"
            # The first to see a call and the last to see its end: DeepSpeed's hooks lie between.
            module.register_forward_pre_hook(partial(self._enter, shown), prepend=True)
            module.register_forward_hook(partial(self._leave, shown), always_call=True)
            for parameter_name, parameter in module.named_parameters(prefix=name, recurse=False):
                if parameter.requires_grad:
                    parameter.register_hook(partial(self._received, shown, parameter_name))

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        self._inside.append(name)
        if module._parameters:
            self.calls.append(Call("called", name, self.step))

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._inside.pop()
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(partial(self._goes_back, name))

    def _goes_back(self, name: str, gradient: torch.Tensor) -> None:
        self._backward = name

    def _received(self, name: str, parameter: str, gradient: torch.Tensor) -> None:
        self._backward = name
        self.calls.append(Call("received the gradient of", parameter, self.step))


def _make_finite(results: list[Any]) -> None:
    """Sums over ranks that are not there may be anything. They must not look like an overflow on some ranks only, whose
    updates would be skipped: so gradients lie within -1 and 1. Counts, which are float64, stay."""
    for result in results:
        if result.is_floating_point() and result.dtype != torch.float64:
            result.nan_to_num_(nan=0.0).clamp_(-1, 1)


class _Rehearsed(Trainer):
    """The trainer, whose phases others see too."""

    seen: Callable[[str], contextlib.AbstractContextManager[None]]

    @contextlib.contextmanager
    def _phase(self, name: Phase) -> Iterator[None]:
        with super()._phase(name), self.seen(name):
            yield


class Rehearsal:
    """What one rank does and what is seen of it; `result` is as far as `run` has come."""

    def __init__(self, config: Config, tree: dict[str, Any], num_steps: int) -> None:
        self._config, self._tree, self._num_steps = config, tree, num_steps
        self._recorder, self._live = Recorder(), LiveMemory(claims=self._made_by_an_update)
        self._is_updating = False
        self._resident: dict[str, int] = {}
        self._tasks = Counter[str]()
        self._started = time.monotonic()

    @contextlib.contextmanager
    def _seen(self, phase: str) -> Iterator[None]:
        with self._recorder.within(phase), self._live.phase(phase):
            yield
        self._resident[phase] = peak_resident_bytes()

    def run(self) -> None:
        """Join a group that moves nothing, and do what ranks do."""
        place = world()
        dist.init_process_group("fake", store=dist.HashStore(), rank=place.rank, world_size=place.size)
        with _objects_stay(self._recorder):
            self.start_and_step(deepspeed_engine.start(alone=without_others))

    def start_and_step(self, device: torch.device) -> None:
        """Start as `uvlm train` does, and take the steps; in a real group too."""
        self._resident["libraries"] = peak_resident_bytes()
        vocab = Vocab.load(self._config.data.tokenizer)
        with self._live, self._recorder:
            with self._seen("build"):
                model, _ = train.build(self._config, vocab, self._tree)
            with self._seen("engine"):
                engine = deepspeed_engine.Engine(model, self._config, self._tree)
            self._claim(engine)
            self._recorder.watch(engine.module)
            watch_updates(engine, partial(self._update, engine))
            self._steps(self._trainer(model, engine, vocab, device))

    def _trainer(
        self, model: UnifiedVLM, engine: deepspeed_engine.Engine, vocab: Vocab, device: torch.device
    ) -> _Rehearsed:
        fixed = checkpoint.fixed_values(self._config, vocab.fingerprint, zero_stage(self._tree))
        widths = Widths.of(model.backbone.config)
        position = checkpoint.Position(0, None)
        trainer = _Rehearsed(self._config, engine, vocab, device, fixed, position, widths, self._started, trust=False)
        trainer.seen = self._seen
        trainer.watchdog.close()
        trainer.guard.show = None
        return trainer

    def _steps(self, trainer: _Rehearsed) -> None:
        batches = iter(trainer.loader)
        for step in range(self._num_steps):
            self._recorder.step = step + 1
            with trainer._phase("data"):
                packs, _ = next(batches)
            self._tasks.update(_tasks_of(packs))
            trainer.train_step(packs, step)
            self._claim(trainer.engine)

    def _claim(self, engine: deepspeed_engine.Engine) -> None:
        """Say which storages are this rank's share of the training state."""
        for kind, tensors in state_tensors(engine).items():
            self._live.claim(kind, tensors)

    def _update(self, engine: deepspeed_engine.Engine, begins: bool) -> None:
        """Some gradients are there only during an update, and what it makes on its way is the optimizer's."""
        self._claim(engine)
        self._is_updating = begins

    def _made_by_an_update(self, operation: str, new: list[torch.Tensor]) -> str | None:
        return "optimizer" if self._is_updating else None

    def result(self) -> Result:
        gc.collect()  # storages that die while peaks are counted would disturb it
        return Result(
            rank=world().rank,
            collectives=self._recorder.collectives,
            calls=self._recorder.calls,
            peaks=self._live.peaks(),
            resident=self._resident,
            tasks=dict(self._tasks),
            seconds=time.monotonic() - self._started,
        )


def _tasks_of(packs: list[Pack]) -> list[str]:
    """The task of each document; -1 is the unused tail of a pack."""
    return [TASKS[number] for pack in packs for number in pack.doc_task.tolist() if number >= 0]


@contextlib.contextmanager
def _objects_stay(recorder: Recorder) -> Iterator[None]:
    """Inside, collectives of Python objects, whose sizes a fake group would leave undefined, keep this rank's own."""

    def broadcast(objects: list[Any], src: int | None = None, group: Any = None, *_: Any, **__: Any) -> None:
        recorder.note("broadcast_object_list", [], dist.get_world_size(group))

    def gather(objects: list[Any], own: Any, group: Any = None) -> None:
        recorder.note("all_gather_object", [], dist.get_world_size(group))
        objects[:] = [own] * len(objects)

    torch_distributed: Any = dist
    before = dist.broadcast_object_list, dist.all_gather_object
    torch_distributed.broadcast_object_list, torch_distributed.all_gather_object = broadcast, gather
    try:
        yield
    finally:
        torch_distributed.broadcast_object_list, torch_distributed.all_gather_object = before


def main(config: str, deepspeed_json: str, num_steps: str, out: str) -> int:
    """Returns the exit code."""
    rehearsal = Rehearsal(load_config(Path(config)), json.loads(Path(deepspeed_json).read_text()), int(num_steps))
    try:
        rehearsal.run()
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    finally:
        Path(out).write_text(json.dumps(rehearsal.result()._asdict()))
    return 0


if __name__ == "__main__":
    leave(main(*sys.argv[1:]))
