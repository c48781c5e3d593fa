"""One torch thread: small models are slower with more, much slower on a busy machine."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

from tests.databases import address, more
from tests.postgres import postgres, stoppable

__all__ = ["address", "more", "postgres", "stoppable"]  # fixtures

torch.set_num_threads(1)

# The same examples at every run of continuous integration; elsewhere new ones are looked for.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


# Whose slow tests measure times, or kill processes by the time that is left to them.
ALONE = {
    f"test_{name}"
    for name in (
        "cluster",
        "dashboard_browser",
        "dashboard_client",
        "deploy",
        "deploy_torch_cpu",
        "deployments",
        "device_hardware",
        "made_ahead",
        "memory_short",
        "profiles",
        "ray_jobs",
        "service",
        "service_limits",
        "solvers_measured",
        "store_away",
        "store_processes",
        "workers",
    )
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of these files."""
    for item in items:
        if item.path.stem in ALONE:
            item.add_marker(pytest.mark.alone)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
