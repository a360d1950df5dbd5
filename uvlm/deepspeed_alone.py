"""The door to what a rehearsal needs of DeepSpeed beyond a training: a rank without others, and a look at its state.

These are insides of deepspeed 0.19, not its interface; tests/test_rehearse.py holds them against real ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from uvlm.engine import Engine


def without_others() -> None:
    """Keep DeepSpeed from waiting for other ranks by ways of its own, and from comparing itself with rank 0's lists,
    which never come. What it would send for that is still sent."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its collectives on a CPU
    utilities = deepspeed.runtime.zero.utils

    def own_length(numbers: list[int]) -> None:
        dist.broadcast(torch.tensor(len(numbers)), src=0)

    def own_list(numbers: list[int]) -> list[int]:
        dist.broadcast(torch.tensor(numbers, dtype=torch.int64), src=0)
        return numbers

    utilities.assert_lst_len_same_as_other_ranks, utilities.get_lst_from_rank0 = own_length, own_list


def watch_updates(engine: Engine, told: Callable[[bool], None]) -> None:
    """Call `told` with True where the optimizer begins an update of this rank's share, and with False at its end."""
    optimizer = engine._engine.optimizer.optimizer
    optimizer.register_step_pre_hook(lambda *_: told(True))
    optimizer.register_step_post_hook(lambda *_: told(False))


def state_tensors(engine: Engine) -> dict[str, list[torch.Tensor]]:
    """What DeepSpeed keeps for a rank at this moment, by kind: parameters, gradients, optimizer."""
    zero = engine._engine.optimizer
    parameters = list(engine.module.parameters())
    masters = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    gradients = [master.grad for master in masters] + tree_leaves(getattr(zero, "averaged_gradients", {}))
    gradients.append(getattr(zero, "grad_partitions_flat_buffer", None))
    kinds = {
        "parameters": [
            tensor
            for p in parameters
            for tensor in (p.data, getattr(p, "ds_tensor", None), getattr(p, "ds_secondary_tensor", None))
        ],
        "gradients": gradients,
        "optimizer": [*masters, *tree_leaves(list(zero.optimizer.state.values()))],
    }
    return {kind: [t for t in tensors if isinstance(t, torch.Tensor)] for kind, tensors in kinds.items()}
