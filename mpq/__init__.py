"""Choose the number format of every layer under memory and measured-latency budgets.

The core types are here at once; `search`, `solve`, `open_store` and the like are loaded on first
use, so that `import mpq` loads neither torch nor ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpq.core.chosen import Chosen
from mpq.core.constraints import Constraint
from mpq.core.deployment import Deployment
from mpq.core.errors import (
    InfeasibleError,
    InvalidInputError,
    MpqError,
    MpqWarning,
    RunFailedError,
    StorageError,
)
from mpq.core.evaluation import Evaluation
from mpq.core.formats import Format, Scheme, parse_format, parse_scheme
from mpq.core.frontier import Chain, Frontier, Surface
from mpq.core.infeasibility import Conflict, Infeasibility
from mpq.core.jobs import JobSpec, RunState
from mpq.core.joint import JointCosts
from mpq.core.layers import Layer, LayerGraph, Unit
from mpq.core.least_cost import LeastCost
from mpq.core.plan import Plan, PlanRow
from mpq.core.problem import Allocation, Budget, Problem, Solution, Status
from mpq.core.profiles import Profile
from mpq.core.referee import MetricVerdict, RefereeReport
from mpq.core.shadow import Alternative, ShadowPrice, ShadowPrices
from mpq.core.stability import Stability
from mpq.core.tables import Cells, CostTable, Responses, SensitivityTable

if TYPE_CHECKING:
    from mpq.client import Client
    from mpq.export import export_allocation, import_allocation
    from mpq.nn.timesteps import timestep_calibration
    from mpq.planning import plan
    from mpq.preparing import prepared
    from mpq.referee.compare import compare_metrics
    from mpq.result import SearchResult
    from mpq.searching import run_job, search
    from mpq.store.store import open_store
    from solvers import solve
    from solvers.least_cost import least_cost
    from solvers.several import apart, together
    from solvers.shadow import shadow_prices

__version__ = "0.1.0"

_LATER = {
    "Client": "mpq.client",
    "SearchResult": "mpq.result",
    "apart": "solvers.several",
    "compare_metrics": "mpq.referee.compare",
    "export_allocation": "mpq.export",
    "import_allocation": "mpq.export",
    "least_cost": "solvers.least_cost",
    "open_store": "mpq.store.store",
    "plan": "mpq.planning",
    "prepared": "mpq.preparing",
    "run_job": "mpq.searching",
    "search": "mpq.searching",
    "shadow_prices": "solvers.shadow",
    "solve": "solvers",
    "timestep_calibration": "mpq.nn.timesteps",
    "together": "solvers.several",
}

__all__ = [
    "Allocation",
    "Alternative",
    "Budget",
    "Cells",
    "Chain",
    "Chosen",
    "Client",
    "Conflict",
    "Constraint",
    "CostTable",
    "Deployment",
    "Evaluation",
    "Format",
    "Frontier",
    "Infeasibility",
    "InfeasibleError",
    "InvalidInputError",
    "JobSpec",
    "JointCosts",
    "Layer",
    "LayerGraph",
    "LeastCost",
    "MetricVerdict",
    "MpqError",
    "MpqWarning",
    "Plan",
    "PlanRow",
    "Problem",
    "Profile",
    "RefereeReport",
    "Responses",
    "RunFailedError",
    "RunState",
    "Scheme",
    "SearchResult",
    "SensitivityTable",
    "ShadowPrice",
    "ShadowPrices",
    "Solution",
    "Stability",
    "Status",
    "StorageError",
    "Surface",
    "Unit",
    "apart",
    "compare_metrics",
    "export_allocation",
    "import_allocation",
    "least_cost",
    "open_store",
    "parse_format",
    "parse_scheme",
    "plan",
    "prepared",
    "run_job",
    "search",
    "shadow_prices",
    "solve",
    "timestep_calibration",
    "together",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        import importlib

        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'mpq' has no attribute {name!r}")
