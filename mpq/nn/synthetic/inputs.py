"""The input of a network that is made up, in the place it has in a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.nn.batches import Batch, arguments, describe
from mpq.nn.resized import resized


@dataclass(frozen=True, slots=True)
class FloatInput:
    """The first floating-point input of a network; whatever else it takes is repeated.

    `shape` is that of one sample. Batches have what the network takes and no targets: a tensor, a
    tuple, or a dict where the sample is one.
    """

    parts: tuple[Any, ...] | dict[str, Any]
    place: int | str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module, sample: Batch | None, source: str) -> FloatInput:
        """Find it in a sample; raises InvalidInputError (`no_sample`, `sample`)."""
        if sample is None:
            raise InvalidInputError(
                "no_sample",
                f"{source} needs the shape of the network's input: give sample=..., one batch such "
                f"as torch.zeros(1, 3, 224, 224) or the entry point of a function that returns it",
            )
        args, kwargs = arguments(model, sample)
        parts: Any = {**kwargs} if kwargs else args
        for place, part in parts.items() if kwargs else enumerate(args):
            if isinstance(part, torch.Tensor) and part.is_floating_point() and part.ndim > 1:
                return cls(parts, place, tuple(part.shape[1:]), part.dtype, part.device)
        raise InvalidInputError(
            "sample",
            f"{source} makes floating-point inputs and the sample ({describe(sample)}) has none: "
            f"give calibration batches, or calibration='random_tokens' for a language model",
        )

    def batch(self, values: torch.Tensor) -> Batch:
        """Return the batch with these values (samples, *shape)."""
        if isinstance(self.parts, dict):
            return {**resized(self.parts, samples=len(values)), self.place: values}
        others = resized(self.parts, samples=len(values))
        whole = tuple(values if n == self.place else part for n, part in enumerate(others))
        return whole[0] if len(whole) == 1 else whole

    def noise(self, samples: int, generator: torch.Generator) -> torch.Tensor:
        """Draw standard normal values (samples, *shape)."""
        drawn = torch.randn(samples, *self.shape, generator=generator)
        return drawn.to(self.device, self.dtype)
