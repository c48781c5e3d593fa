"""A search as a user asks for it: every option checked, a job made of them, and run here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from mpq.artifacts import parts_of
from mpq.asked import check_asked
from mpq.choices import scheme_texts
from mpq.core.jobs import (
    Activations,
    Clip,
    Correction,
    Divergence,
    JobSpec,
    OnIndivisible,
    given_groups,
)
from mpq.core.live import live_text
from mpq.core.problem import Budget, budget_text
from mpq.core.profiles import Profile, given_profiles
from mpq.core.protocols import Executor
from mpq.intake import load
from mpq.pipeline import run
from mpq.progress import Bars, Progress, Silent
from mpq.result import SearchResult
from mpq.store.store import Store, open_store


def search(
    model: nn.Module | str,
    calibration: Any,
    *,
    budgets: Sequence[str | Budget] | None = None,
    minimise: str | Mapping[str, float] | None = None,
    schemes: Sequence[str] | None = None,
    metric: str = "gauss_newton",
    solver: str = "auto",
    loss: Any = None,
    evaluate: Any = None,
    held_out: Any = None,
    sample: Any = None,
    profiles: Mapping[str, Profile] | None = None,
    divergence: Divergence = "auto",
    skip: Sequence[str] = (),
    pin: Mapping[str, str] | None = None,
    groups: Literal["auto", "none"] | Sequence[Sequence[str]] = "auto",
    embeddings: bool = False,
    kv_cache: bool | Mapping[str, int] = False,
    kv_schemes: Sequence[str] | None = None,
    activations: Activations = "tied",
    activation_schemes: Sequence[str] | None = None,
    clip: Clip = "minmax",
    transforms: Sequence[str] = (),
    observer: str = "minmax",
    corrections: Sequence[Correction] = (),
    on_indivisible: OnIndivisible = "refuse",
    quality: Mapping[str, Any] | None = None,
    quality_groups: Literal["auto"] | Mapping[str, Sequence[str]] = "auto",
    limits: Sequence[str] = (),
    hardware: str = "local",
    executor: Literal["ray", "serial"] = "ray",
    num_workers: int | None = None,
    ray_address: str | None = None,
    worker_resources: Mapping[str, float] | None = None,
    task_tries: int = 3,
    task_grace_seconds: float = 600.0,
    num_probes: int = 2,
    refine: int = 4,
    latency_seconds: float = 60.0,
    metric_seconds: float = 120.0,
    precision: float | Literal["settled"] | None = None,
    num_trials: int = 100,
    trial_seconds: float = 600.0,
    study: str | None = None,
    risk: float | None = None,
    seed: int = 0,
    storage: str | Store | None = None,
    name: str = "",
    progress: Progress | bool = False,
) -> SearchResult:
    """Choose a scheme for every layer under all budgets, measure it, and keep everything.

    `model` is an nn.Module, "package.module:factory" or a Hugging Face directory; `calibration`
    and `held_out` are lists of batches, entry points of functions that return them or synthetic
    data: "zeroq", "genie(samples=128)", "random_tokens" (mpq.core.synthetic); `sample`
    is one batch of the shape that will be served (default: one calibration sample), which MACs
    and latency are for. `profiles` such as {"prefill": Profile(tokens=512), "decode":
    Profile(tokens=1, weight=64.0)} are the shapes of a network that is served in several: each
    is a cost by its name ("decode <= 20 ms"), and latency is their weighted mean. Budgets are
    texts such as "memory <= 60%", "latency <= 3 ms", "memory <= uniform int4" or Budget records.
    `schemes` defaults to what the hardware runs: "local" is this machine, measured, "device:NAME" a
    node of the Ray cluster, measured there; "roofline:H100" a model of one that is not here,
    "table:FILE.csv" times of your own, "bitplanes:a=...,c=..." kernels of bit planes.
    `loss(output, batch)` is used by the Hessian metric only; `evaluate(model)` returns
    {"name": number} and is reported. `divergence` compares outputs ("auto": cosine for outputs of
    unit length, else kl of logits). `clip` is how weight ranges are cut, `on_indivisible`
    what becomes of groups that do not divide a layer: "refuse", or "channel", a scale for each
    channel. `kv_cache=True`, or {"context": 4096, "batch": 8}, searches the KV caches of a language
    model too, `activations` "apart" the inputs of layers apart from weights (see JobSpec for their
    schemes). `transforms`, `observer` and `corrections` are the calibration pipeline (JobSpec).
    `quality` is {name: function}, by name (mpq.nn.quality), entry point or as it is; with it the
    sum of the qualities, each over the best uniform scheme's, decides instead of the divergence,
    and `quality_groups`, {name: [patterns of units]}, says which units each one scores ("auto":
    those that move it most). `limits` such as "accuracy >= 0.99" or "accuracy drop <= 1%" must be
    met on calibration data. `minimise`, "memory" or {"memory": 1.0, "latency": 2e6}, turns the
    question round: the least of a cost at which all limits are met, whatever the budgets. The
    metric "auto" scores by several within `metric_seconds` and lets measurements pick. Scoring ends
    early at a `precision`: a relative standard error, or "settled" (mpq.adaptive). The solvers
    "evolution", "optuna" and "nsga2" measure at most `num_trials` allocations within
    `trial_seconds`; `study` is the URL of a database that Optuna's trials are copied to. Each
    budget on measured times holds with probability `risk` (None: 0.95; 0.5 takes them as they are;
    solvers.risk). Tasks run on the Ray cluster at `ray_address` ("auto", "host:port"), by workers
    that take `worker_resources` such as {"gpu": 1}; tries and grace of tasks: see JobSpec.

    Raises InvalidInputError for what cannot be done as asked, InfeasibleError where no
    allocation meets the budgets (before anything is scored), RunFailedError for broken work.
    """
    lists = {"skip": skip, "limits": limits, "kv_schemes": kv_schemes}
    lists |= {"transforms": transforms, "corrections": corrections}
    lists["activation_schemes"] = activation_schemes
    check_asked(budgets, minimise, pin, quality, groups, lists)
    budgets = () if budgets is None else budgets
    profiles = given_profiles(profiles)
    spec = JobSpec(
        name=name,
        model=live_text(model),
        calibration=live_text(calibration),
        held_out=None if held_out is None else live_text(held_out),
        sample=None if sample is None else live_text(sample),
        profiles=dict(profiles),
        evaluate=None if evaluate is None else live_text(evaluate),
        loss=None if loss is None else live_text(loss),
        divergence=divergence,
        budgets=tuple(b if isinstance(b, str) else budget_text(b, profiles) for b in budgets),
        minimise=dict(minimise) if isinstance(minimise, Mapping) else minimise,
        schemes=None if schemes is None else scheme_texts(schemes),
        metric=metric,
        solver=solver,
        clip=clip,
        transforms=tuple(transforms),
        observer=observer,
        corrections=tuple(corrections),
        on_indivisible=on_indivisible,
        skip=tuple(skip),
        pin={layer: str(scheme) for layer, scheme in (pin or {}).items()},
        groups=groups if groups in ("auto", "none") else tuple(tuple(g) for g in groups),
        embeddings=embeddings,
        kv_cache=dict(kv_cache) if isinstance(kv_cache, Mapping) else kv_cache,
        kv_schemes=None if kv_schemes is None else tuple(kv_schemes),
        activations=activations,
        activation_schemes=None if activation_schemes is None else tuple(activation_schemes),
        hardware=hardware,
        quality={quality_name: live_text(q) for quality_name, q in (quality or {}).items()},
        quality_groups=given_groups(quality_groups),
        limits=tuple(limits),
        executor=executor,
        num_workers=num_workers,
        ray_address=ray_address,
        worker_resources=dict(worker_resources or {}),
        task_tries=task_tries,
        task_grace_seconds=task_grace_seconds,
        seed=seed,
        num_probes=num_probes,
        refine=refine,
        latency_seconds=latency_seconds,
        metric_seconds=metric_seconds,
        precision=precision,
        num_trials=num_trials,
        trial_seconds=trial_seconds,
        study=study,
        risk=risk,
    )
    given = load(
        model,
        calibration,
        held_out=held_out,
        sample=sample,
        loss=loss,
        evaluate=evaluate,
        quality=quality,
        profiles=profiles,
        seed=seed,
    )
    listener = progress if not isinstance(progress, bool) else Bars() if progress else Silent()
    return run(spec, given, open_store(storage), listener)


def run_job(
    spec: JobSpec,
    storage: str | Store | None = None,
    progress: Progress | None = None,
    run_id: str | None = None,
    executor: Executor | None = None,
) -> SearchResult:
    """Run a job whose parts are kept or entry points, here; `run_id` is a run that we drive."""
    store = open_store(storage)
    given = load(**parts_of(store, spec), seed=spec.seed)
    progress = progress or Silent()
    return run(spec, given, store, progress, run_id=run_id, executor=executor)
