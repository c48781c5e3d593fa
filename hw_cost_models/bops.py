"""Bit operations: the hardware-neutral count of HAWQ-V3."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np

from hw_cost_models.work import branch_macs
from mpq.core.errors import InvalidInputError
from mpq.core.formats import NATIVE_BITS
from mpq.core.joint import JointCosts
from mpq.core.layers import Layer, LayerGraph
from mpq.core.tables import Cells, CostTable

_NATIVE = NATIVE_BITS["fp32"] ** 2
_MOST_PAIRS = 2**20  # of cells: a solver looks at each
_HALF = NATIVE_BITS["fp16"] ** 2


def _macs(layer: Layer) -> int:
    return 0 if layer.kind == "embedding" else layer.macs  # a look-up multiplies nothing


class BitOperations:
    """BOPs of a layer = MACs * weight bits * activation bits.

    Yao et al., HAWQ-V3, ICML 2021, section 3.4. Activations that are left alone count 32 bits,
    embeddings 0 MACs. Tied layers store one weight but multiply in each of their places. Shares in
    a wider format count their own bits, a low-rank branch its own MACs at 16 * 16 bits. Where
    inputs are searched apart, a product of two units' bits is a joint cost of theirs.
    """

    name = "bops"

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the BOPs of every cell, and of pairs of cells of weights and inputs apart.

        `fixed` counts the layers outside the search at 32 * 32 bits and `baseline` the whole
        network so. Raises InvalidInputError (`joint`) for more pairs than a solver can look at.
        """
        apart = _unit_of_input(graph)
        tied, products = dict[str, int](), defaultdict[tuple[str, str], int](int)
        for unit, layers in graph.kernels.items():
            tied[unit] = sum(_macs(layer) for layer in layers if layer.name not in apart)
            for layer in layers:
                if layer.name in apart:
                    products[unit, apart[layer.name]] += _macs(layer)
        values = np.array(
            [
                tied[unit] * scheme.weights.mean_bits * scheme.activations.bits
                + _HALF * sum(branch_macs(layer, scheme) for layer in graph.kernels[unit])
                for unit, scheme in cells
            ],
            np.float64,
        )
        joint = _joint(cells, products, values)
        total = sum(_macs(layer) for layer in graph.layers)
        searched = sum(tied.values()) + sum(products.values())
        table = CostTable.exact(
            self.name,
            "bitops",
            cells,
            values,
            fixed=float(_NATIVE * (total - searched)),
            baseline=float(_NATIVE * total),
            weights=graph.searched_weights,
        )
        return replace(table, joint=joint)


def _unit_of_input(graph: LayerGraph) -> dict[str, str]:
    """Return the unit that the input of a layer is in, of layers whose input is apart."""
    named = graph.by_name
    return {
        named[name].source: unit.name
        for unit in graph.units
        for name in unit.layers
        if named[name].is_input
    }


def _joint(
    cells: Cells, products: dict[tuple[str, str], int], values: np.ndarray
) -> JointCosts | None:
    """Return MACs * weight bits * activation bits of pairs of cells.

    What the fewest activation bits offered cost already is added to `values`, so that a bound
    which knows nothing of pairs is as high as can be.
    """
    first, second, terms = [], [], []
    for (weights, inputs), macs in products.items():
        one, other = cells.unit_number(weights), cells.unit_number(inputs)
        bits = [scheme.activations.bits for scheme in cells.schemes[other]]
        for i, scheme in enumerate(cells.schemes[one], int(cells.offsets[one])):
            values[i] += macs * scheme.weights.mean_bits * min(bits)
            for j, more in enumerate(bits, int(cells.offsets[other])):
                if more > min(bits):
                    first.append(i)
                    second.append(j)
                    terms.append(float(macs * scheme.weights.mean_bits * (more - min(bits))))
    if len(terms) > _MOST_PAIRS:
        raise InvalidInputError(
            "joint",
            f"BOPs of weights and inputs apart are {len(terms):,} pairs of cells: offer fewer "
            f"schemes, or search activations with the weights",
        )
    if not terms:
        return None
    return JointCosts(
        cells=cells, first=np.array(first), second=np.array(second), values=np.array(terms)
    )
