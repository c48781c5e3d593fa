"""Last stage: the chosen network is written and its bytes are counted."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from mpq.candidates import Proposal
from mpq.core.evaluation import CHOSEN
from mpq.export.packed import write_packed
from mpq.nn.workload import Workload
from mpq.store.store import Store


def weigh(chosen: Proposal, workload: Workload, store: Store, run_id: str) -> None:
    """Write the chosen network to a file, count its bytes, and keep them with the evaluation."""
    with tempfile.TemporaryDirectory(prefix="mpq-") as folder:
        packed = write_packed(
            Path(folder) / "packed.safetensors",
            workload.model,
            workload.graph,
            chosen.allocation,
            workload.quantizer,
            _corrected(workload, chosen),
        )
    totals = chosen.solution.totals
    assert totals is not None
    for evaluation in store.evaluations(run_id):
        if evaluation.candidate == CHOSEN:
            store.put_evaluation(
                run_id,
                replace(
                    evaluation,
                    predicted_bytes=round(totals["memory"]),
                    measured_bytes=packed.tensor_bytes,
                ),
            )
    header = packed.file_bytes - packed.tensor_bytes
    store.log(run_id, "file", f"packed file: {packed.tensor_bytes} bytes + {header} of header")


def _corrected(workload: Workload, chosen: Proposal) -> dict[str, torch.Tensor]:
    """Return what corrections make of biases and statistics; a bias that is not needed is zero."""
    if not workload.input_means and not workload.reestimate:
        return {}
    with workload.quantized_as(chosen.allocation) as model:
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {
        part.name: state.get(part.name, torch.zeros(part.elements))
        for part in workload.graph.unsearched
    }
