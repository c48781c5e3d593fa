"""The relative squared error of a unit's weights, without data.

    score(l, c) = ||Q_c(W_l) - W_l||_F^2 / ||W_l||_F^2        (t_l^2 of sensitivity.higgs)

added up over the stored weights of a unit. It knows nothing of what the network does with the
weights, and by itself ranks layers badly: a baseline, and the factor that depends on the scheme
in other scores. Exact. Weights only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpq.core.formats import Scheme
from mpq.core.layers import Layer
from mpq.core.protocols import Partial, Scores, Task
from mpq.core.tables import Cells, SensitivityTable
from mpq.nn.fingerprint import digest
from mpq.nn.workload import Workload
from sensitivity.tasks import refuse_activations, refuse_apart

_VERSION = 1


class WeightError:
    """The metric `weight_error`, for weights: one task, no forward pass."""

    name = "weight_error"

    def tasks(self, workload: Workload) -> Sequence[Task]:
        """Return one task; its key holds model and cells.

        Raises InvalidInputError for schemes that quantize activations, and what is searched apart.
        """
        refuse_apart(self.name, workload)
        refuse_activations(self.name, workload)
        cells = [(unit, str(scheme)) for unit, scheme in workload.cells]
        key = digest(self.name, _VERSION, workload.key, cells, workload.seed)
        return [Task(key, (), label="all weights")]

    def run(self, workload: Workload, task: Task) -> Partial:
        """Return "errors" of (cells,)."""
        errors = [
            sum(relative_error(workload, layer, scheme) for layer in layers)
            for unit, schemes in zip(workload.graph.units, workload.cells.schemes, strict=True)
            for layers in [workload.graph.stored_layers(unit)]
            for scheme in schemes
        ]
        return {"errors": np.array(errors)}

    def combine(self, cells: Cells, partials: Sequence[Partial]) -> Scores:
        """Return the error of every cell; it is exact, so its standard error is 0."""
        (partial,) = partials
        errors = partial["errors"].astype(np.float64)
        table = SensitivityTable(
            metric=self.name, cells=cells, values=errors, stderr=np.zeros(len(errors))
        )
        return Scores(sensitivity=table)


def relative_error(workload: Workload, layer: Layer, scheme: Scheme) -> float:
    """Return ||Q(W) - W||^2 / ||W||^2 of one layer; 0 for a weight of zeros."""
    weight = workload.model.get_parameter(layer.weight_id).detach()
    stored = workload.quantizer.fake_quantize(
        layer.weight_id, weight, scheme.weights, layer.channel_axis
    )
    power = float(weight.double().square().sum())
    noise = float((stored.double() - weight.double()).square().sum())
    return noise / power if power else 0.0
