"""How a layer's output changes from its base scheme to each of its choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from mpq.core.formats import Scheme
from mpq.core.layers import Layer
from mpq.nn.quantizers import fake_quantize_activation
from mpq.nn.replay import replay
from mpq.nn.weights import CacheOf, ExpertWeight, weight_of
from mpq.nn.workload import Workload

_GHOST_ELEMENTS = 2**25  # of weight gradients held at once
_REPLAY_ELEMENTS = 2**26  # of changed outputs held at once


class Change:
    """One layer in its base scheme (None: as it is), and what each choice makes of it.

    A choice that leaves the weight and the input as they are changes nothing, exactly. The output
    of experts is their weight (see `Calls`). Of an input searched apart the weight never changes; a
    KV cache reads and gives the output of its projection, and its formats change what it reads.
    """

    def __init__(
        self,
        workload: Workload,
        layer: Layer,
        module: nn.Module,
        choices: Sequence[Scheme],
        base: Scheme | None = None,
    ) -> None:
        self._module = module
        self._choices = choices
        self._base = base
        self._layer = layer
        own = torch.empty(0) if layer.is_cache else weight_of(module).detach()

        def stored(scheme: Scheme) -> torch.Tensor:
            if layer.is_cache or (layer.is_input and base is None):
                return own
            return workload.quantizer.fake_quantize(
                layer.weight_id, own, scheme.weights, layer.channel_axis
            )

        self._weight = own if base is None else stored(base)
        if layer.source:
            self._stored = [self._weight] * len(choices)
            return
        self._stored = [self._weight if s == base else stored(s) for s in choices]
        for i, (scheme, tensor) in enumerate(zip(choices, self._stored, strict=True)):
            if scheme.weights.is_native and torch.equal(tensor, self._weight):
                self._stored[i] = self._weight

    @property
    def deltas(self) -> list[torch.Tensor | None]:
        """The change of the weight in each choice, None where there is none."""
        return [
            None if stored is self._weight else stored - self._weight for stored in self._stored
        ]

    def outputs(self, inputs: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (choice, change of the output) for every choice that changes something."""
        seen = self._seen(inputs, self._base)
        changed, others = self._split()
        step = max(1, _REPLAY_ELEMENTS // max(1, seen.numel()))
        for first in range(0, len(changed), step):
            some = changed[first : first + step]
            yield from zip(some, self._replayed(seen, some), strict=True)
        if others:
            before = replay(self._module, seen, self._weight, None)
            for i in others:
                inputs_seen = self._seen(inputs, self._choices[i])
                yield i, replay(self._module, inputs_seen, self._stored[i], None) - before

    def inner(self, inputs: torch.Tensor, gradient: torch.Tensor, samples: int) -> torch.Tensor:
        """Return <gradient_k, change_c> of each sample, on the processor.

        The shape is (choices, samples, len(gradient)).
        """
        found = torch.zeros(len(self._choices), samples, len(gradient))
        changed, _ = self._split()
        if isinstance(self._module, ExpertWeight):  # of one sample
            for i in changed:
                delta = (self._stored[i] - self._weight).flatten()
                found[i, 0] = torch.mv(gradient.flatten(1), delta).float().cpu()
            return found
        seen = self._seen(inputs, self._base)
        ghost = bool(changed) and self._ghost_is_cheaper(seen, gradient, samples, len(changed))
        if ghost:
            found[changed] = self._ghost(seen, gradient, samples, changed).float().cpu()
        for i, change in self.outputs(inputs) if not ghost else self._of_inputs(inputs):
            found[i] = _inner(gradient, change, samples).cpu()
        return found

    def _of_inputs(self, inputs: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the choices that change the input as well."""
        _, others = self._split()
        if others:
            before = replay(self._module, self._seen(inputs, self._base), self._weight, None)
            for i in others:
                inputs_seen = self._seen(inputs, self._choices[i])
                yield i, replay(self._module, inputs_seen, self._stored[i], None) - before

    def _split(self) -> tuple[list[int], list[int]]:
        """Return the choices that change only the weight, and those that change the input."""
        only_weights = [i for i, scheme in enumerate(self._choices) if self._same_inputs(scheme)]
        others = [i for i in range(len(self._choices)) if i not in only_weights]
        return [i for i in only_weights if self._stored[i] is not self._weight], others

    def _same_inputs(self, scheme: Scheme) -> bool:
        if self._layer.is_cache:
            return scheme == self._base
        if self._base is None:
            return scheme.activations.is_native
        return scheme.activations == self._base.activations

    def _seen(self, inputs: torch.Tensor, scheme: Scheme | None) -> torch.Tensor:
        if scheme is None:
            return inputs
        if isinstance(self._module, CacheOf):
            return self._module.kept(inputs, scheme.weights)
        return fake_quantize_activation(
            inputs, scheme.activations, self._layer.static_range(scheme.activations)
        )

    def _replayed(self, inputs: torch.Tensor, changed: list[int]) -> torch.Tensor:
        """Return the change of the output for each change of the weight, in which it is linear."""
        deltas = [self._stored[i] - self._weight for i in changed]
        if not self._has_free_channels():
            return torch.stack([replay(self._module, inputs, delta, None) for delta in deltas])
        together = replay(self._module, inputs, torch.cat(deltas), None)  # one larger call
        if isinstance(self._module, nn.Linear):
            return together.reshape(*together.shape[:-1], len(deltas), -1).movedim(-2, 0)
        shape = (len(together), len(deltas), -1, *together.shape[2:])
        return together.reshape(shape).movedim(1, 0)

    def _has_free_channels(self) -> bool:
        """Tell whether output channels are independent, so that more can be added."""
        if isinstance(self._module, nn.Conv1d | nn.Conv2d):
            return self._module.groups == 1
        return isinstance(self._module, nn.Linear)

    def _ghost_is_cheaper(
        self, inputs: torch.Tensor, gradient: torch.Tensor, samples: int, choices: int
    ) -> bool:
        """Compare multiplications: weight gradients of all probes against one replay a choice."""
        if not isinstance(self._module, nn.Linear):
            return False
        positions = inputs[..., 0].numel() // samples
        return len(gradient) * (positions + choices) < choices * positions

    def _ghost(
        self, inputs: torch.Tensor, gradient: torch.Tensor, samples: int, changed: list[int]
    ) -> torch.Tensor:
        """Return the inner products through the weight's gradient of each sample and probe."""
        deltas = torch.stack([(self._stored[i] - self._weight).flatten() for i in changed])
        x = inputs.reshape(samples, -1, inputs.shape[-1])
        g = gradient.reshape(len(gradient), samples, -1, gradient.shape[-1])
        step = max(1, _GHOST_ELEMENTS // (len(gradient) * deltas.shape[1]))
        found = []
        for first in range(0, samples, step):
            some = slice(first, first + step)
            of_weight = torch.matmul(g[:, some].transpose(-1, -2), x[some])  # (K, s, out, in)
            found.append(torch.matmul(of_weight.flatten(2), deltas.T))
        return torch.cat(found, dim=1).permute(2, 1, 0)


def _inner(gradient: torch.Tensor, change: torch.Tensor, samples: int) -> torch.Tensor:
    """Return <gradient_k, change> of each sample as (samples, K)."""
    g = gradient.reshape(len(gradient), samples, -1).permute(1, 2, 0)
    c = change.reshape(samples, 1, -1)
    return torch.bmm(c, g).squeeze(1).float()
