"""The GPU of a worker: the network, its batches and ranges go there once."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mpq.core.errors import InvalidInputError
from mpq.nn.batches import Batch
from mpq.nn.workload import Workload


def placed_on_gpu(workload: Workload) -> Workload:
    """Return the workload on the GPU that this process was given; its network moves there.

    Products stay in the network's own precision (no TF32), so that scores differ from those of a
    processor by the rounding of sums: content keys do not name the device. Raises
    InvalidInputError (`no_gpu`) where torch finds no GPU.
    """
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise InvalidInputError(
            "no_gpu",
            f"a worker on node {platform.node()} was given a GPU (CUDA_VISIBLE_DEVICES {visible}), "
            f"but torch {torch.__version__} finds none there: install a torch built for it, or "
            f"leave 'gpu' out of worker_resources",
        )
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return placed(workload, torch.device("cuda"))


def placed(workload: Workload, device: torch.device) -> Workload:
    """Return the workload with its network, batches and searched ranges on a device."""
    quantizer = workload.quantizer
    factors = {key: _moved(factor, device) for key, factor in quantizer.factors.items()}
    made = {key: _moved(arrays, device) for key, arrays in quantizer.made.items()}
    return replace(
        workload,
        model=workload.model.to(device),
        calibration=tuple(_moved(batch, device) for batch in workload.calibration),
        held_out=tuple(_moved(batch, device) for batch in workload.held_out),
        quantizer=replace(quantizer, factors=factors, made=made),
    )


def _moved(value: Batch | Any, device: torch.device) -> Any:
    """Return a batch with every tensor on a device; mappings become dicts, as where one is cut."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_moved(part, device) for part in value)
    return value
