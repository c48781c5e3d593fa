"""What a diffusion model is called with at each step while it samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpq.core.errors import InvalidInputError, unknown
from mpq.nn.batches import Batch, num_samples, output_tensor
from mpq.nn.patch import evaluating

_TIMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas")


@dataclass(frozen=True, slots=True)
class Step:
    """The batch of one timestep, and the feature that was watched, flattened."""

    timestep: float
    batch: Batch
    feature: torch.Tensor | None = None


def record_steps(
    model: nn.Module,
    sample_loop: Callable[[nn.Module], object],
    *,
    timestep: str | None = None,
    feature: str | None = None,
    seed: int = 0,
) -> list[Step]:
    """Run `sample_loop(model)` and return what the network was called with, a record a timestep.

    Batches are dicts of the arguments of `forward`. Calls at the same timestep, as with and
    without a condition, are joined along the samples. `timestep` names the argument that is the
    time (default: timestep, t, time or sigma, whichever there is); `feature` a module whose output
    is kept, such as the middle block. The network is in eval mode and the loop's draws begin at
    `seed`; both are as before afterwards. Raises InvalidInputError (`timestep`) where there is no
    such argument or no call, or a batch has samples of different times.
    """
    signature = inspect.signature(model.forward)
    name = _time_name(model, signature, timestep)
    calls: list[tuple[float, dict[str, Any]]] = []
    features: list[torch.Tensor] = []

    def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = dict(signature.bind(*args, **kwargs).arguments)
        calls.append((_time_of(name, found.get(name)), {k: _kept(v) for k, v in found.items()}))

    def watched(_: nn.Module, __: object, output: Any) -> None:
        features.append(output_tensor(output).detach().clone())

    handles = [model.register_forward_pre_hook(called, with_kwargs=True)]
    if feature is not None:
        modules = dict(model.named_modules())
        if feature not in modules:
            raise unknown("module", feature, modules)
        handles.append(modules[feature].register_forward_hook(watched))
    try:
        with evaluating(model, seed), torch.no_grad():
            sample_loop(model)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise InvalidInputError("timestep", "the sample loop did not call the model")
    if feature is not None and len(features) != len(calls):
        raise InvalidInputError(
            "timestep",
            f"module {feature!r} ran {len(features)} times in {len(calls)} calls of the model: "
            f"name one that runs once a call",
        )
    return [
        Step(
            time,
            _joined([batch for at, batch in calls if at == time]),
            torch.cat(
                [f.flatten() for f, (at, _) in zip(features, calls, strict=True) if at == time]
            )
            if features
            else None,
        )
        for time in dict.fromkeys(at for at, _ in calls)
    ]


def _time_name(model: nn.Module, signature: inspect.Signature, given: str | None) -> str:
    names = list(signature.parameters)
    if given is not None and given not in names:
        raise unknown("argument", given, names)
    found = given or next((name for name in _TIMES if name in names), None)
    if found is None:
        raise InvalidInputError(
            "timestep",
            f"no argument of {type(model).__name__}.forward{signature} is called "
            f"{', '.join(_TIMES)}: say which is the time with timestep='NAME'",
        )
    return found


def _time_of(name: str, value: Any) -> float:
    times = torch.as_tensor(value).flatten().double() if value is not None else torch.empty(0)
    if not len(times) or not bool((times == times[0]).all()):
        seen = f"{float(times.min()):g} to {float(times.max()):g}" if len(times) else "not given"
        raise InvalidInputError(
            "timestep", f"each call of the sample loop is at one time, and {name} was {seen}"
        )
    return float(times[0])


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Join batches along the samples; what has no sample axis is that of the first."""
    sizes = [num_samples(batch) for batch in batches]

    def part(key: str) -> Any:
        values = [batch[key] for batch in batches]
        has_samples = all(
            isinstance(value, torch.Tensor) and value.ndim and len(value) == size
            for value, size in zip(values, sizes, strict=True)
        )
        return torch.cat(values) if has_samples else values[0]

    if any(batch.keys() != batches[0].keys() for batch in batches):
        raise InvalidInputError(
            "timestep",
            "calls of the model at one time differ in their arguments: record each alone",
        )
    return {key: part(key) for key in batches[0]} if len(batches) > 1 else batches[0]
