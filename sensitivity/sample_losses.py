"""The user's loss, one sample at a time, so that gradients and error bars are those of samples."""

from __future__ import annotations

import torch

from mpq.core.errors import InvalidInputError, MpqError
from mpq.nn.batches import Batch, cut, describe, num_samples
from mpq.nn.workload import Workload
from sensitivity.calls import Part, loss_of


def require_loss(metric: str, workload: Workload) -> None:
    """Raise InvalidInputError where the workload has no loss."""
    if workload.loss is None:
        raise InvalidInputError(
            "loss", f"{metric} needs the loss: give loss(output, batch), or use metric='kl'"
        )


def sample_losses(
    workload: Workload, number: int, batch: Batch, output: torch.Tensor
) -> torch.Tensor:
    """Return the loss of each sample of calibration batch `number` or a part of it, shape (N,).

    The user's loss is called once for each sample, with a batch of that sample alone. Raises
    InvalidInputError where it fails or is no finite number.
    """
    samples = num_samples(batch)
    found = []
    for n in range(samples):
        one = batch if samples == 1 else cut(batch, n, n + 1)
        of_one = output if samples == 1 else output[n : n + 1]
        try:
            found.append(loss_of(workload, Part(number, one, n, 1), of_one).reshape(()))
        except MpqError:
            raise
        except Exception as error:  # whatever a user's loss raises
            lines = str(error).strip().splitlines() or [repr(error)]
            raise InvalidInputError(
                "loss",
                f"the loss cannot take one sample of batch {number} ({describe(one)}, output "
                f"{list(of_one.shape)}): {lines[0]}",
            ) from error
    return torch.stack(found)
