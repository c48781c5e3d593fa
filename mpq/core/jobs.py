"""A job as it is submitted, and the life of the run it becomes."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal, get_args

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.profiles import Profile, as_texts, given_profiles
from mpq.core.risk import check_risk
from mpq.core.synthetic import SYNTHESISED, Synthetic, is_synthetic

Divergence = Literal["auto", "kl", "cosine", "mse"]
Clip = Literal["minmax", "mse"]
Correction = Literal["bias", "batch_norm"]
CORRECTIONS: tuple[Correction, ...] = ("bias", "batch_norm")
OnIndivisible = Literal["refuse", "channel"]
Activations = Literal["tied", "apart"]
# Keys that are one of a few words.
_WORDS: dict[str, tuple[str, ...]] = {
    "clip": get_args(Clip),
    "on_indivisible": get_args(OnIndivisible),
    "activations": get_args(Activations),
}
_WITH_STUDY = ("optuna", "nsga2")  # solvers that keep an Optuna study
# Keys that mean something only where the loss is minimised, and their defaults.
_BY_LOSS = {"solver": "auto", "precision": None, "quality_groups": "auto"}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """Everything a search is asked for; entry points are "package.module:name".

    `version` is that of this record, `name` what a person calls the run. `model` is called
    without arguments and returns the network, "package.module:factory@weights.safetensors" with
    the weights of a file, or is a Hugging Face directory or id "hf:name"; `calibration` and
    `held_out` return lists of batches, or ask for synthetic ones, "zeroq" or "genie(samples=128)"
    (mpq.core.synthetic); `sample` one batch of the shape that will be served
    (default: the first calibration sample alone), which MACs, memory while running and latency
    are for; each of these may be "artifact:<digest>", an object that the database keeps.
    `profiles` are further shapes by name (mpq.core.profiles): each is a cost of its own,
    and latency is their weighted mean in place of the sample's. `evaluate(model)` returns
    {"name": number}; `loss(output, batch)` a scalar (only the Hessian metric needs it).
    `divergence` compares outputs ("auto": cosine for outputs of unit length, else kl of logits).
    `budgets` are texts (mpq.core.budgets) that hold together. `schemes` are what every layer may
    take (None: what the hardware runs), `clip` is how weight ranges are cut, `on_indivisible` what
    becomes of groups that do not divide a layer ("channel": a scale for each channel), `metric`
    names what scores (`sensitivity.METRICS`), `solver` what chooses (`solvers.SOLVERS`).
    `embeddings` are searched only where asked. `kv_cache` searches the caches of keys and values of
    a language model too, {"context": 4096, "batch": 8} says how much they hold (default: the
    sample's), in one of `kv_schemes` (None: 16 bits, int8, int4 in groups). `activations` "apart"
    searches the inputs of layers, in `activation_schemes`, apart from weights. `transforms` such as
    "smooth(0.5)" (mpq.nn.transforms) make the network that is searched of the one that is given,
    `observer` finds static ranges of layer inputs (mpq.nn.observers), `corrections` are made in the
    quantized network: "bias" takes back what rounding weights moves mean outputs by, "batch_norm"
    estimates running statistics again. Tasks run in the `executor`, "ray" with `num_workers`
    processes (None: one for each processor) or "serial", here; `ray_address`, "auto" or
    "host:port", is an existing Ray cluster (None: a local Ray). `worker_resources` is what each
    worker of Ray takes beside one processor, {"gpu": 1, "device:a100": 1}: with a GPU the network
    and the batches are on it. A task is tried `task_tries` times and hangs after
    `task_grace_seconds`, or 20 times the median task where that is longer. Every random draw comes
    from `seed`.
    `num_probes` is the random probes of each calibration sample, `refine` the steps that try to
    improve the best measured allocation (0: none), `latency_seconds` what timing kernels may
    take. The solvers "evolution", "optuna" and "nsga2" measure at most `num_trials` allocations
    within `trial_seconds`; `study` is the URL of a database that Optuna's trials are copied to
    (no password in it: the job is kept with the run). The metric "auto" scores by several within
    `metric_seconds`; measurements pick. Scoring ends early at a `precision`: a relative standard
    error, or "settled" (see mpq.adaptive). `skip` and the keys of `pin` are layer names or shell
    patterns; `groups` adds units. `hardware` is "local" (this machine's kernels, measured),
    "local:torch_cpu" (those of a library), "device:NAME" or "device:NAME/torch_cpu" (a node of the
    Ray cluster that has the resources "device:NAME" and "bench", measured there) or what
    `hw_cost_models.get_hardware` reads.
    `quality` names quality functions (mpq.nn.quality) or entry points of them, `quality_groups`
    gives the patterns of the units that each scores (see mpq.decoupled); `limits` such as
    "accuracy >= 0.99" or "accuracy drop <= 1%" are on metrics of `evaluate`, on qualities or on
    named quality functions (mpq.core.limits). `minimise` turns the question round: the least of a
    cost, or of a weighted sum {cost: weight}, at which every limit is met; there need be no budget.
    Each budget on measured times holds with probability `risk` (None: 0.95).
    Raises InvalidInputError (`job_value`, `profile`) for a number out of its range.
    """

    version: Literal[1] = 1
    name: str = ""
    model: str
    calibration: str
    held_out: str | None = None
    sample: str | None = None
    profiles: dict[str, Profile] = field(default_factory=dict)
    evaluate: str | None = None
    loss: str | None = None
    divergence: Divergence = "auto"
    budgets: tuple[str, ...]
    minimise: str | dict[str, float] | None = None
    schemes: tuple[str, ...] | None = None  # None: what this machine's kernels run
    metric: str = "gauss_newton"
    solver: str = "auto"
    clip: Clip = "minmax"
    transforms: tuple[str, ...] = ()
    observer: str = "minmax"
    corrections: tuple[Correction, ...] = ()
    on_indivisible: OnIndivisible = "refuse"
    skip: tuple[str, ...] = ()
    pin: dict[str, str] = field(default_factory=dict)
    groups: Literal["auto", "none"] | tuple[tuple[str, ...], ...] = "auto"
    embeddings: bool = False
    kv_cache: bool | dict[str, int] = False
    kv_schemes: tuple[str, ...] | None = None
    activations: Activations = "tied"
    activation_schemes: tuple[str, ...] | None = None
    hardware: str = "local"
    quality: dict[str, str] = field(default_factory=dict)
    quality_groups: Literal["auto"] | dict[str, tuple[str, ...]] = "auto"
    limits: tuple[str, ...] = ()
    executor: Literal["ray", "serial"] = "ray"
    num_workers: int | None = None
    ray_address: str | None = None
    worker_resources: dict[str, float] = field(default_factory=dict)
    task_tries: int = 3
    task_grace_seconds: float = 600.0
    seed: int = 0
    num_probes: int = 2
    refine: int = 4
    latency_seconds: float = 60.0
    metric_seconds: float = 120.0
    precision: float | Literal["settled"] | None = None
    num_trials: int = 100
    trial_seconds: float = 600.0
    study: str | None = None
    risk: float | None = None

    def __post_init__(self) -> None:
        self._at_least("num_probes", 1)
        self._at_least("refine", 0)
        self._at_least("seed", 0)
        self._at_least("num_trials", 1)
        self._at_least("task_tries", 1)
        if self.num_workers is not None:
            self._at_least("num_workers", 1)
        for name in ("latency_seconds", "metric_seconds", "trial_seconds", "task_grace_seconds"):
            seconds: float = getattr(self, name)
            if not isinstance(seconds, Real) or not 0 < seconds < math.inf:
                raise InvalidInputError(
                    "job_value", f"{name}: a positive number of seconds, got {seconds!r}"
                )
        self._check_apart()
        object.__setattr__(self, "profiles", as_texts(given_profiles(self.profiles)))
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise unknown(name.replace("_", " "), getattr(self, name), words)
        for name in self.corrections:
            if name not in CORRECTIONS:
                raise unknown("correction", name, CORRECTIONS)
            if self.corrections.count(name) > 1:
                raise InvalidInputError("job_value", f"corrections: {name!r} is there twice")
        if "" in self.quality:
            raise InvalidInputError("job_value", "quality: '' is no name, give each quality one")
        if self.study is not None and self.solver not in _WITH_STUDY:
            raise InvalidInputError(
                "job_value",
                f"study: solvers {' and '.join(map(repr, _WITH_STUDY))} keep one, got "
                f"{self.study!r} with solver {self.solver!r}: choose one of them or leave it out",
            )
        if self.ray_address is not None and self.executor != "ray":
            raise InvalidInputError(
                "job_value",
                f"ray_address {self.ray_address!r} is for executor 'ray', got {self.executor!r}",
            )
        for name in SYNTHESISED:
            if is_synthetic(asked := getattr(self, name)):
                Synthetic.parse(asked)
        self._check_worker_resources()
        if self.risk is not None:
            check_risk(self.risk, "job_value")
        self._check_minimise()
        wanted = self.precision
        if wanted is None or wanted == "settled":
            return
        if not isinstance(wanted, float) or not 0 < wanted < 1:
            raise InvalidInputError(
                "job_value",
                "precision: 'settled' or a relative standard error between 0 and 1 such as 0.05, "
                f"got {wanted!r}",
            )

    @property
    def minimised(self) -> dict[str, float]:
        """The costs to minimise and their weights; none where the loss is minimised."""
        if self.minimise is None:
            return {}
        return {self.minimise: 1.0} if isinstance(self.minimise, str) else dict(self.minimise)

    def _check_apart(self) -> None:
        sizes = self.kv_cache if isinstance(self.kv_cache, Mapping) else {}
        for name, size in sizes.items():
            whole = isinstance(size, Integral) and not isinstance(size, bool) and size > 0
            if name not in ("context", "batch") or not whole:
                raise InvalidInputError(
                    "job_value",
                    "kv_cache is true, or {'context': 4096, 'batch': 8} in whole numbers, got "
                    f"{name!r}: {size!r}",
                )
        if not isinstance(self.kv_cache, bool | Mapping):
            raise InvalidInputError(
                "job_value", f"kv_cache is true or {{'context': 4096}}, got {self.kv_cache!r}"
            )
        for name, needs, given in (
            ("kv_schemes", "kv_cache=True", self.kv_cache is not False),
            ("activation_schemes", "activations='apart'", self.activations == "apart"),
        ):
            texts = getattr(self, name)
            if isinstance(texts, str) or (texts is not None and not texts):
                raise InvalidInputError("job_value", f"{name} is a list of texts, got {texts!r}")
            if texts is not None and not given:
                raise InvalidInputError("job_value", f"{name} needs {needs}: add it")

    def _check_worker_resources(self) -> None:
        for name, amount in self.worker_resources.items():
            real = isinstance(amount, Real) and not isinstance(amount, bool)
            if not name or not real or not 0 < amount < math.inf:
                raise InvalidInputError(
                    "job_value",
                    f"worker_resources is {{'gpu': 1}} or {{'device:NAME': 1}} with positive "
                    f"numbers, got {name!r}: {amount!r}",
                )
        if self.worker_resources and self.executor != "ray":
            raise InvalidInputError(
                "job_value",
                f"worker_resources {self.worker_resources!r} is for executor 'ray', got "
                f"{self.executor!r}",
            )

    def _check_minimise(self) -> None:
        if self.minimise is None:
            return
        if not isinstance(self.minimise, str | Mapping) or not self.minimised:
            raise InvalidInputError(
                "job_value",
                f"minimise: a cost such as 'memory' or {{cost: weight}}, got {self.minimise!r}",
            )
        for cost, weight in self.minimised.items():
            if not isinstance(weight, Real) or not 0 < weight < math.inf:
                raise InvalidInputError(
                    "job_value", f"minimise: the weight of {cost!r} is positive, got {weight!r}"
                )
        if not self.limits:
            raise InvalidInputError(
                "job_value",
                f"minimise {self.minimise!r} needs at least one limit on what may be lost: add "
                "for example limits=['accuracy drop <= 1%']",
            )
        by_loss = [name for name, only in _BY_LOSS.items() if getattr(self, name) != only]
        for name in [*by_loss, *(["metric"] if self.metric == "auto" else [])]:
            raise InvalidInputError(
                "job_value",
                f"minimise: {name} {getattr(self, name)!r} judges by the loss under budgets, which "
                f"is not minimised here: leave {name} out",
            )

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise InvalidInputError(
                "job_value", f"{name}: a whole number from {least} on, got {value!r}"
            )


def given_groups(asked: object) -> Literal["auto"] | dict[str, tuple[str, ...]]:
    """Return quality groups as a job keeps them; raises InvalidInputError for anything else."""
    if asked == "auto":
        return "auto"
    if not isinstance(asked, Mapping) or any(
        isinstance(patterns, str)
        or not isinstance(patterns, Sequence)
        or not all(isinstance(pattern, str) for pattern in patterns)
        for patterns in asked.values()
    ):
        raise InvalidInputError(
            "quality_groups", f"quality_groups is 'auto' or {{quality: [patterns]}}, got {asked!r}"
        )
    return {name: tuple(patterns) for name, patterns in asked.items()}


class RunState(enum.StrEnum):
    """States and their names follow Ray Jobs."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


ENDED = frozenset({RunState.STOPPED, RunState.SUCCEEDED, RunState.FAILED})

_NEXT = {
    RunState.PENDING: {RunState.RUNNING, RunState.STOPPED, RunState.FAILED},
    RunState.RUNNING: {RunState.STOPPED, RunState.SUCCEEDED, RunState.FAILED},
    RunState.STOPPED: {RunState.PENDING, RunState.RUNNING},  # resumed
    RunState.FAILED: {RunState.PENDING, RunState.RUNNING},  # resumed
    RunState.SUCCEEDED: set(),
}


def check_transition(old: RunState, new: RunState) -> None:
    """Raise InvalidInputError where a run may not go from `old` to `new`."""
    if new not in _NEXT[old]:
        allowed = ", ".join(sorted(_NEXT[old])) or "nothing: it is final"
        raise InvalidInputError("run_state", f"a {old} run cannot become {new}; allowed: {allowed}")
