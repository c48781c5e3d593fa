"""Weights that calibration data of their own layer alone decide: GPTQ, and families that ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from mpq.core.formats import Format
from mpq.core.layers import Layer
from mpq.nn.layer_data import Want, layer_data, why_no_data
from mpq.nn.patch import ParameterName
from mpq.nn.quantizers import quantize_weight
from mpq.nn.quantizers.stored import LayerData, StoredWeight
from mpq.nn.rounding.gptq import gptq
from mpq.nn.workload import Workload

Stored = tuple[ParameterName, Format, StoredWeight]
Wanted = Mapping[ParameterName, tuple[Layer, Sequence[Format]]]


def data_wanted(fmt: Format) -> frozenset[Want]:
    """Return what of a layer's data a format takes to store a weight, rounding included."""
    of_inputs = fmt.rounding == "gptq" or (fmt.family, fmt.variant) == ("binary", "partial")
    if of_inputs or fmt.rank:
        return frozenset({"gram"})
    if fmt.high is not None:
        return frozenset({"gram", "outputs"})
    return frozenset({"fisher"}) if fmt.family == "kmeans" else frozenset()


def data_of(layer: Layer, fmt: Format) -> frozenset[Want]:
    """Return what of a layer's data there is of all that a format takes.

    Of layers without an input of vectors (`why_no_data`) there is nothing, and a family makes do
    with the weight alone, as it does with the Grams of groups, of which it knows one.
    """
    if why_no_data(layer):
        return frozenset()
    wanted = data_wanted(fmt)
    grouped = layer.convolution is not None and layer.convolution.groups > 1
    return wanted - {"gram"} if grouped and fmt.rounding == "nearest" else wanted


def layerwise(workload: Workload, wanted: Wanted) -> Iterator[Stored]:
    """Yield each weight stored in each of its formats; passes over the data are shared by all."""
    needs: dict[ParameterName, set[Want]] = {
        name: {want for fmt in formats for want in data_of(layer, fmt)}
        for name, (layer, formats) in wanted.items()
    }
    parameters = dict(workload.model.named_parameters())

    def stored(name: ParameterName, data: LayerData) -> Iterator[Stored]:
        layer, formats = wanted[name]
        weight = parameters[name].detach()
        for fmt in formats:
            own = data_of(layer, fmt)
            given = LayerData(**{want: getattr(data, want) for want in own})
            axis = layer.channel_axis
            factor = workload.quantizer.factor(name, weight, fmt.as_stored, axis)
            store = gptq if fmt.rounding == "gptq" else quantize_weight
            with torch.no_grad():
                yield name, fmt, store(weight, fmt, axis, factor, given)

    for name, need in needs.items():
        if not need:
            yield from stored(name, LayerData())
    for name, data in layer_data(workload, {n: need for n, need in needs.items() if need}):
        yield from stored(name, data)
