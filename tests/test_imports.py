"""Who may import whom, and how little `import mpq` and `mpq --help` load."""

from __future__ import annotations

import ast
import json
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import mpq
from sensitivity import METRICS, get_metric
from solvers import SOLVERS, get_solver

ROOT = Path(mpq.__file__).parents[1]
PACKAGES = ("mpq", "sensitivity", "solvers", "hw_cost_models", "workers")

# What the server shows, and with what.
FACES = tuple(
    f"mpq.{name}"
    for name in (
        "across_tables",
        "additivity",
        "comparison",
        "datatable",
        "export",
        "jobfile",
        "layer_use",
        "pins",
        "result",
        "run_tables",
        "stated",
        "what_if",
    )
)
WEB = ("anyio", "fastapi", "prometheus_client", "starlette", "uvicorn")

# Package: (what it may import of this project, what it may import of others).
RULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "mpq.core": (("mpq.core",), ("numpy",)),
    "mpq.nn": (("mpq.core", "mpq.nn"), ("numpy", "torch")),
    "mpq.store": (("mpq.core", "mpq.store"), ("numpy", "sqlalchemy", "alembic", "pydantic")),
    "mpq.dashboard": (
        ("mpq.core", "mpq.store", "mpq.service", "mpq.dashboard", "solvers", *FACES),
        (*WEB, "jinja2", "markupsafe", "numpy", "pydantic", "typer"),
    ),
    "mpq.packing": (
        ("mpq.core", "mpq.packing", "mpq.trust"),
        ("numpy", "torch", "safetensors", "transformers"),
    ),
    "sensitivity": (("mpq.core", "mpq.nn", "sensitivity"), ("numpy", "torch", "pyhessian")),
    "hw_cost_models": (
        ("mpq.core", "mpq.nn", "hw_cost_models"),
        ("numpy", "torch", "onnx", "onnxruntime", "filelock"),
    ),
    "solvers": (("mpq.core", "solvers"), ("numpy", "pulp", "highspy", "optuna", "numba")),
    "workers": (("mpq.core", "workers"), ("ray", "grpc")),
}

# Each of these is slow or large: imported in these files and no other.
HEAVY = {
    "pulp": {"solvers/milp.py"},
    "highspy": {"solvers/milp.py", "solvers/relaxation.py", "solvers/threads.py"},
    "pyhessian": {"sensitivity/hessian_products.py"},
    "ray": {"workers/ray_cluster.py", "workers/ray_jobs.py"},
    "onnxruntime": {"hw_cost_models/measured/onnxruntime.py", "mpq/deploy/onnxruntime.py"},
    "onnx": {
        "hw_cost_models/measured/graphs.py",
        "mpq/deploy/marked.py",
        "mpq/deploy/onnx_model.py",
    },
    "transformers": {"mpq/models.py", "mpq/packing/pretrained.py"},
    "plotly": {"mpq/figures.py"},
    "optuna": {"solvers/optuna_search.py"},
    "safetensors": {
        "mpq/export/packed.py",
        "mpq/export/compressed_weights.py",
        "mpq/models.py",
        "mpq/packing/reading.py",
        "mpq/packing/writing.py",
    },
    "gguf": {"mpq/export/gguf.py"},
    "torchao": set(),
    "compressed_tensors": set(),
    "numba": {"solvers/compiled.py"},
    "pandas": {"mpq/datatable.py"},
    "pyarrow": {"mpq/datatable.py"},
    "httpx2": {"mpq/remote.py"},
}

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imported(path: Path) -> frozenset[str]:
    """Return the full names of everything a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_package_may(path: Path) -> None:
    for package, (own, others) in RULES.items():
        if within(module_of(path), (package,)):
            allowed = (*own, *others, *sys.stdlib_module_names, "mpq.__version__")
            assert [name for name in imported(path) if not within(name, allowed)] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_the_command_line_or_what_is_not_installed(path: Path) -> None:
    outside = ("mpq.cli", "tests", "examples", "benchmarks")
    assert [name for name in imported(path) if within(name, outside)] == []


@pytest.mark.parametrize("library", HEAVY)
def test_a_heavy_library_is_imported_in_few_files(library: str) -> None:
    files = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(within(name, (library,)) for name in imported(path))
    }
    assert files <= HEAVY[library]


CLI = ["cli", "cli_database", "cli_options", "cli_query", "cli_serve", "cli_service"]


@pytest.mark.parametrize("name", CLI)
def test_the_command_line_imports_inside_its_commands(name: str) -> None:
    tree = ast.parse((ROOT / "mpq" / f"{name}.py").read_text())
    eager = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    found = {module for module in eager if module and within(module, PACKAGES)}
    assert found <= {f"mpq.{name}" for name in CLI}


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)


def loaded(code: str) -> set[str]:
    """Return the top-level modules that a new interpreter has after running some code."""
    report = "\nimport sys, json; print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    return {name.partition(".")[0] for name in json.loads(run(code + report).stderr)}


HELP = """
import sys
sys.argv = ["mpq", "--help"]
from mpq.cli import main
try:
    main()
except SystemExit:
    pass
"""
SLOW = {"torch", "ray", "transformers", "sqlalchemy", "onnxruntime", *WEB, *HEAVY}


@pytest.mark.parametrize(
    "code",
    ["import mpq", HELP, "import solvers, sensitivity, hw_cost_models, workers"],
    ids=["import", "help", "plugins"],
)
def test_nothing_slow_is_loaded_before_it_is_needed(code: str) -> None:
    assert loaded(code) & SLOW == set()


def test_solving_loads_no_torch() -> None:
    code = """
from mpq import CostTable, Budget, Problem, SensitivityTable, parse_scheme, solve
cells = {("a", parse_scheme(text)): value for text, value in (("int4", 1.0), ("int8", 2.0))}
solve(Problem(
    sensitivity=SensitivityTable.from_cells("m", cells),
    costs={"memory": CostTable.from_cells("memory", "bytes", cells)},
    budgets=(Budget("memory", 1.5),),
))
"""
    assert loaded(code) & {"torch", "ray", "transformers"} == set()


def test_help_answers_in_half_a_second() -> None:
    spent = []
    for _ in range(5):  # processor time, so that a busy machine does not count
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run("from mpq.cli import main; main()", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5


@pytest.mark.parametrize("name", mpq.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(mpq, name) is not None


def test_the_public_names_are_those_of_all() -> None:
    own = {
        name
        for name, value in vars(mpq).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "").partition(".")[0] in PACKAGES
    }
    assert own <= set(mpq.__all__)
    assert list(mpq.__all__) == sorted(set(mpq.__all__))


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        mpq.serach  # noqa: B018


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_answers_to_its_name(name: str) -> None:
    assert get_metric(name).name == name


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_answers_to_its_name(name: str) -> None:
    assert get_solver(name).name == name


@pytest.mark.parametrize("package", ["sensitivity", "solvers", "hw_cost_models", "workers"])
def test_every_plug_in_file_is_registered_or_used(package: str) -> None:
    """A file that nothing imports is a plug-in someone forgot to register."""
    files = {module_of(path): path for path in SOURCES}
    used = {name for path in files.values() for name in imported(path)}
    strings = {
        node.value.partition(":")[0]
        for node in ast.walk(ast.parse((ROOT / package / "__init__.py").read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    forgotten = [
        module
        for module, path in files.items()
        if within(module, (package,))
        and path.name != "__init__.py"
        and module not in strings
        and not any(within(name, (module,)) for name in used)
    ]
    assert forgotten == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
