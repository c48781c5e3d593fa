"""Products of a loss's Hessian with vectors, by PyHessian, and the model borrowed for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpq.core.errors import InvalidInputError
from mpq.nn.batches import position_mask
from mpq.nn.patch import evaluating, frozen
from mpq.nn.workload import Workload
from sensitivity.calls import Part, loss_of

Vectors = Sequence[torch.Tensor]  # one for each variable, of its shape


@contextmanager
def twice_differentiable(workload: Workload, *weights: torch.Tensor) -> Iterator[None]:
    """Borrow the model so that only `weights` have gradients, which have gradients themselves."""
    with (
        evaluating(workload.model),
        frozen(workload.model),
        sdpa_kernel(SDPBackend.MATH),  # the fused attention kernels have no second derivative
        torch.enable_grad(),
    ):
        for weight in weights:
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(False)


def loss_on(workload: Workload, part: Part) -> torch.Tensor:
    """Return the user's loss, or the mean divergence from the network's own outputs.

    The Hessian of that divergence is the Gauss-Newton matrix, since its gradient is zero.
    """
    output = workload.output(part.number, part.batch)
    if workload.loss is None:
        mask = position_mask(part.batch, output)
        return workload.divergence.between(output.detach(), output, mask).mean()
    return loss_of(workload, part, output)


class HessianProducts:
    """The Hessian of a loss with respect to some variables, which can be multiplied.

    Costs one backward pass that can be differentiated again, then about two more for each
    product. Variables that the loss does not depend on, or only linearly, have zero products.
    Raises InvalidInputError where the model cannot be differentiated twice.
    """

    def __init__(self, loss: torch.Tensor, variables: Vectors) -> None:
        self._gradients: dict[int, torch.Tensor] = {}  # those that depend on a variable
        self._variables = list(variables)
        if loss.requires_grad:
            with _refused():
                found = torch.autograd.grad(loss, variables, create_graph=True, allow_unused=True)
            self._gradients = {
                i: g for i, g in enumerate(found) if g is not None and g.requires_grad
            }

    def __call__(self, vectors: Vectors) -> list[torch.Tensor]:
        """Return H v, one tensor for each variable."""
        from pyhessian.utils import hessian_vector_product

        products = [torch.zeros_like(v) for v in vectors]
        if self._gradients:
            with _refused():
                found = hessian_vector_product(
                    list(self._gradients.values()),
                    [self._variables[i] for i in self._gradients],
                    [vectors[i] for i in self._gradients],
                )
            for i, product in zip(self._gradients, found, strict=True):
                products[i] = product
        return products


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise InvalidInputError(
            "hessian_unsupported",
            f"the model cannot be differentiated twice: {str(error).splitlines()[0]}; use "
            f"metric='gauss_newton', which needs first derivatives only",
        ) from error
