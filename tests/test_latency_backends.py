"""Every backend of measured kernels tells the same truth about what it runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hw_cost_models import KERNELS, get_kernels
from hw_cost_models.measured.cuda import Gpu
from mpq.core.formats import parse_scheme
from tests.contracts import kernel_contract
from tests.test_latency_cuda import Device, gpu
from tests.test_latency_kernels import CONVS, LINEAR, WORDS

SCHEMES = [
    parse_scheme(f"{weights}{activations}")
    for weights in ("fp32", "bf16", "fp16", "int8", "int8t", "int8a", "int4g32", "int4g64a", "int2")
    for activations in ("", ":int8", ":int8s", ":int7")
]


@pytest.mark.parametrize("hardware", ["local", *(f"local:{name}" for name in KERNELS)])
def test_every_backend_keeps_the_contract(hardware: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if hardware == "local:torch_cpu" and "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch without the x86 quantized engine")
    monkeypatch.setattr(Gpu, "here", lambda: gpu(Device()))
    backend = get_kernels(hardware, network_weights=2**16)
    experts = replace(LINEAR, kind="experts")
    layers = [LINEAR, CONVS["plain"], CONVS["up"], WORDS, experts]
    cases = kernel_contract(backend, layers, SCHEMES)
    assert len({case.shape for case in cases}) == 4
    assert all(" in a network of 64Ki weights" in case.shape for case in cases)
