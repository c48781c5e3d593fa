"""The network with one thing changed at a time: what any functions say of its outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mpq.core.errors import InvalidInputError, MpqWarning
from mpq.core.memory import ran_out_of_memory
from mpq.nn.batches import Batch, checked_call, cut, num_samples, portions
from mpq.nn.weights import CacheOf, layer_module, weight_of
from mpq.nn.workload import Workload
from sensitivity.prefix import Prefix, used_elsewhere

Floats = npt.NDArray[np.float64]
Function = Callable[[torch.Tensor, torch.Tensor, Batch], torch.Tensor]

_without_cache: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True, slots=True)
class Variant:
    """The network with unit number `unit` changed: a context, None where nothing changes."""

    name: str
    unit: int
    context: Callable[[], AbstractContextManager[object]] | None


def sweep(
    workload: Workload,
    number: int,
    variants: Sequence[Variant],
    functions: Mapping[str, Function],
) -> dict[str, Floats]:
    """Return what each function says of each variant and sample of calibration batch `number`.

    A function maps (original output, changed output, batch) to one number for each sample, shape
    (N,); the result is one array (variants, samples) for each name. Outputs are those of plain
    forward passes of the whole batch bit for bit: what precedes a change is remembered, not run
    again (sensitivity.prefix). A batch is cut where the workload takes fewer samples at once, and
    in halves while what must be remembered of it is more than memory allows. Every pass starts from
    the same state of the random generator. Raises InvalidInputError where a function returns
    something else or a number that is not finite.

    Cost: at most one forward pass for each variant, about half of that in a deep network.
    """
    batch = workload.calibration[number]
    with workload.evaluating(number), torch.no_grad():
        generator = torch.get_rng_state()
        elsewhere = _used_elsewhere(workload, number, batch)
        torch.set_rng_state(generator)
        found = [
            half
            for portion in portions(batch, workload.at_once)
            for half in _halves(workload, number, portion, variants, functions, elsewhere)
        ]
    return {name: np.concatenate([part[name] for part in found], axis=1) for name in functions}


def _used_elsewhere(workload: Workload, number: int, batch: Batch) -> set[int]:
    return used_elsewhere(workload.model, lambda: workload.output(number, cut(batch, 0, 1)))


def _halves(
    workload: Workload,
    number: int,
    batch: Batch,
    variants: Sequence[Variant],
    functions: Mapping[str, Function],
    elsewhere: set[int],
) -> Iterator[dict[str, Floats]]:
    passes = _Passes(workload, number, batch, elsewhere)
    samples = num_samples(batch)
    if passes.overflowed and samples > 1:
        del passes
        for start, stop in ((0, samples // 2), (samples // 2, samples)):
            part = cut(batch, start, stop)
            yield from _halves(workload, number, part, variants, functions, elsewhere)
        return
    found = {name: np.zeros((len(variants), samples)) for name in functions}
    for i in sorted(range(len(variants)), key=lambda i: passes.starts[variants[i].unit]):
        output = passes.changed(variants[i])
        for name, function in functions.items():
            said = function(passes.reference, output, batch)
            where = f"{name} of {variants[i].name} on batch {number}"
            found[name][i] = _checked(where, said, samples)
    yield found


def _checked(where: str, said: object, samples: int) -> npt.NDArray[np.generic]:
    if not isinstance(said, torch.Tensor) or tuple(said.shape) != (samples,):
        got = list(said.shape) if isinstance(said, torch.Tensor) else type(said).__name__
        raise InvalidInputError(
            "quality", f"{where} is {got}: return one number for each of {samples} samples"
        )
    if not torch.isfinite(said).all():
        raise InvalidInputError(
            "quality", f"{where} is not finite: leave that scheme out or give another function"
        )
    values: npt.NDArray[np.generic] = said.double().cpu().numpy()
    return values


class _Passes:
    """Passes over one batch: the original's, remembered, and those with one change."""

    def __init__(self, workload: Workload, number: int, batch: Batch, elsewhere: set[int]) -> None:
        self._workload = workload
        self._where = f"calibration batch {number}"
        self._batch = batch
        self._generator = torch.get_rng_state()
        holders = [_holders(workload, unit) for unit in range(len(workload.graph.units))]
        self._prefix = Prefix(workload.model, [m for modules in holders for m in modules])
        self.starts = [0] * len(holders)
        if workload.model in _without_cache:
            self.reference = self._run(finite=True)
            return
        self.reference = self._prefix.record(lambda: self._run(finite=True))
        self.starts = [
            0 if _reads(modules) & elsewhere else self._prefix.start_of(modules)
            for modules in holders
        ]
        if not self.overflowed:
            self._prove()

    @property
    def overflowed(self) -> bool:
        return self._prefix.overflowed

    def _prove(self) -> None:
        """Switch remembering off where the last start does not give the very same output."""
        try:
            again = self._replayed(max(self.starts, default=0))
            same = self._prefix.in_step and torch.equal(again, self.reference)
        except Exception as error:  # a user's forward that cannot stand what was remembered
            if ran_out_of_memory(error):
                raise
            same = False
        if not same:
            self._give_up()

    def _give_up(self) -> None:
        self.starts = [0] * len(self.starts)
        _without_cache.add(self._workload.model)
        warnings.warn(
            "the network does not give the same output twice where layers before a change are "
            "not run again, so every pass runs all of it: scoring takes about twice as long",
            MpqWarning,
            stacklevel=2,
        )

    def changed(self, variant: Variant) -> torch.Tensor:
        """Return the output of a variant; call in the order of `starts`, to hold little."""
        if variant.context is None:
            return self.reference
        start = self.starts[variant.unit]
        self._prefix.release(start)
        with variant.context():
            output = self._replayed(start)
            if not self._prefix.in_step:
                self._give_up()
                output = self._run()
        return output

    def _replayed(self, start: int) -> torch.Tensor:
        return self._prefix.replay(self._run, start)

    def _run(self, finite: bool = False) -> torch.Tensor:
        torch.set_rng_state(self._generator)
        return checked_call(self._workload.model, self._batch, self._where, finite)


def _holders(workload: Workload, number: int) -> list[nn.Module]:
    """Return the modules that hold a weight of a unit (others are tied to its layers too).

    Of a cache it is the projection whose output is kept.
    """
    names = workload.graph.units[number].layers
    changed = [layer_module(workload.model, name) for name in names]
    kept = [module.projection for module in changed if isinstance(module, CacheOf)]
    weights = {id(weight_of(module)) for module in changed if not isinstance(module, CacheOf)}
    return kept + [
        module
        for module in workload.model.modules()
        if any(id(parameter) in weights for parameter in module._parameters.values())
    ]


def _reads(modules: Sequence[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module._parameters.values()}
