"""Liger's norm and FFN kernels, where `use_fused_kernels` puts them: the loss and gradients stay the same.

Run by `make test-flash`: on a GPU, else on the CPU under Triton's interpreter, where two gaps of the interpreter are
filled in below. That proves that the right modules are patched and that they mean the same, not the CUDA kernels.
"""

from __future__ import annotations

import importlib.util
from typing import Any, get_args

import pytest
import torch

from tests.helpers import mixed_pack, tiny_model
from uvlm.backbone import Family, use_fused_kernels
from uvlm.model import UnifiedVLM
from uvlm.policies import Policy
from uvlm.token_plan import TokenPlan

ON_GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.flash, pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")]


@pytest.fixture(autouse=True)
def liger(monkeypatch: pytest.MonkeyPatch, triton_kernels: bool) -> None:
    """Liger kernels that run on this machine; the classes that they patch in transformers come back afterwards."""
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.fail("the Liger kernels are not installed; install them: pip install 'uvlm[gpu]'")
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen3 import modeling_qwen3

    for module in (modeling_llama, modeling_qwen2, modeling_qwen3):
        for name in [name for name in vars(module) if name.endswith(("RMSNorm", "MLP"))]:
            monkeypatch.setattr(module, name, getattr(module, name))
    if not triton_kernels:
        _fill_gaps_of_the_interpreter(monkeypatch)


def _fill_gaps_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    import liger_kernel.ops.rms_norm
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:  # the interpreter leaves a float argument a Python float, without `.to`
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: tl.math.rsqrt(x))  # CUDA's own has no CPU body
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def _loss_and_gradients(model: UnifiedVLM, policy: Policy) -> list[torch.Tensor]:
    device = next(model.parameters()).device
    pack = mixed_pack()
    plan = TokenPlan.of(pack, policy, model.num_layers)
    loss, *_ = model(pack.to(device), plan.to(device), torch.ones(len(plan.supervised), device=device))
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("family", get_args(Family))
def test_fused_kernels_change_neither_loss_nor_gradients(family: Family) -> None:
    policy = Policy.model_validate({"input": {"name": "pyramid"}, "target": {"name": "ffn_skip"}})
    model = tiny_model(family, policy=policy).to("cuda" if ON_GPU else "cpu")
    if ON_GPU:
        model.bfloat16()
    before = _loss_and_gradients(model, policy)
    assert use_fused_kernels(model.backbone)
    layer = model.backbone.model.layers[0]
    for module in (layer.input_layernorm, layer.mlp, model.backbone.model.norm):
        assert "liger" in str(module.forward.__func__).lower(), "it is Liger's forward that runs"
    for got, want in zip(_loss_and_gradients(model, policy), before, strict=True):
        assert (got - want).norm() <= (2e-2 if ON_GPU else 1e-5) * want.norm().clamp(min=1e-6)


def test_without_a_gpu_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not use_fused_kernels(tiny_model().backbone)
