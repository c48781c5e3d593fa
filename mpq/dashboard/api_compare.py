"""Questions about several runs over HTTP, and about kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel

from mpq.across_tables import comparison_table, layers_table
from mpq.comparison import compare_runs
from mpq.core.errors import InvalidInputError
from mpq.dashboard.api_runs import PREFIX, Filters
from mpq.dashboard.files import FileSuffix, TableView, sent, told_table
from mpq.dashboard.masking import masked
from mpq.dashboard.problems import told
from mpq.dashboard.site import Site
from mpq.datatable import DataTable
from mpq.layer_use import layer_uses
from mpq.run_tables import kernels_table
from mpq.store.timed_devices import timed_devices

_MOST = 20
Runs = Annotated[list[Annotated[str, Query(max_length=300)]], Query(max_length=_MOST)]
Device = Annotated[str | None, Query(max_length=2000)]


class ComparisonView(BaseModel):
    """Runs side by side, see `mpq.comparison.Comparison`; null where a run lacks a number."""

    runs: list[str]
    names: list[str]
    settings: Mapping[str, list[Any]]
    units_of_measure: Mapping[str, str]
    totals: Mapping[str, list[float | None]]
    measured: Mapping[str, list[float | None]]
    stderr: Mapping[str, list[float | None]]
    layers: Mapping[str, list[str | None]]
    same_layers: int


class LayerUseView(BaseModel):
    """How many of the runs that searched a layer gave it which scheme, how many weight bits."""

    layer: str
    runs: int
    schemes: Mapping[str, int]
    bits: Mapping[str, int]
    least_bits: int
    mean_bits: float


class LayersView(BaseModel):
    """The layers of one model over the chosen allocations of runs."""

    model: str
    runs: int
    layers: list[LayerUseView]


def routes(site: Site) -> APIRouter:
    """Return the routes of several runs."""
    router = APIRouter(prefix=PREFIX, tags=["several runs"], responses=told(409))
    store = site.store

    @router.get("/compare")
    def compare(run: Runs) -> ComparisonView:
        """Compare runs: what differs of their jobs, numbers and layers."""
        view = compare_runs(store, run).view()
        return ComparisonView(**{**view, "settings": masked(view["settings"])})

    @router.get("/compare.{suffix}", response_class=Response)
    def compare_file(suffix: FileSuffix, run: Runs) -> Response:
        """Return the layers that differ as a file, with a column of each run."""
        return sent(comparison_table(compare_runs(store, run)), suffix)

    @router.get("/layers")
    def layers(filters: Annotated[Filters, Query()]) -> LayersView:
        """Tell how often the runs of one model gave each layer how many bits."""
        return LayersView(**layer_uses(store, **filters.wanted()).view())

    @router.get("/layers.{suffix}", response_class=Response)
    def layers_file(suffix: FileSuffix, filters: Annotated[Filters, Query()]) -> Response:
        """Return the same as a file, with a column of each number of bits."""
        return sent(layers_table(layer_uses(store, **filters.wanted())), suffix)

    @router.get("/kernels", response_model=TableView)
    def kernels(device: Device = None) -> Any:
        """Return the measured times of kernels, of one device or of all."""
        return told_table(_times(device))

    @router.get("/kernels.{suffix}", response_class=Response)
    def kernels_file(suffix: FileSuffix, device: Device = None) -> Response:
        """Return the same as a file."""
        return sent(_times(device), suffix)

    def _times(device: str | None) -> DataTable:
        known = [found.device for found in timed_devices(store)]
        if device is not None and device not in known:
            raise InvalidInputError("not_stored", f"no kernel was timed on {device[:200]!r}")
        return kernels_table(store, known if device is None else [device])

    return router
