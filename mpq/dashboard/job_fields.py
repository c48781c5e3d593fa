"""The keys of a job as fields of a form: their order, their words, and the kind of each."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mpq.jobfile import job_names, job_schema

Kind = Literal["line", "lines", "pairs", "choice", "check", "number", "value"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One key: `kind` tells how its text is read, `default` is the text of what it is if empty.

    "line" is one text, "lines" one text a line, "pairs" lines of "name = value", "number" a
    number, "value" a word or JSON; "choice" one of `choices`, "check" on or off. Other kinds with
    `choices` only suggest them.
    """

    key: str
    kind: Kind
    label: str
    hint: str
    example: str
    default: str
    choices: tuple[str, ...]
    is_required: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Fields that belong together; `rare` ones are folded away."""

    title: str
    fields: tuple[Field, ...]
    rare: tuple[Field, ...]


_APART = ("kv_cache", "kv_schemes", "activations", "activation_schemes")
_ORDER: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "What",
        ("name", "model", "calibration", "held_out", "evaluate"),
        ("sample", "loss", "profiles", "quality", "quality_groups"),
    ),
    ("Budgets", ("budgets", "limits", "minimise"), ("risk",)),
    (
        "Choices",
        ("schemes", "hardware", "skip", "pin"),
        ("embeddings", *_APART, "groups", "clip", "on_indivisible"),
    ),
    ("How", ("metric", "solver", "divergence"), ()),  # and every key that is nowhere else
)
# Key: label, what it means, an example.
_WORDS: dict[str, tuple[str, str, str]] = {
    "name": ("Name", "what people call the run", "my first search"),
    "model": (
        "Model",
        "entry point of a function that returns the network, or hf:organisation/name",
        "package.module:make_model",
    ),
    "calibration": (
        "Calibration batches",
        "entry point of a function that returns a list of batches; where there are none: "
        "zeroq, genie (both need a sample) or random_tokens",
        "package.module:calibration_batches",
    ),
    "held_out": (
        "Held-out batches",
        "batches that the result is judged on; none: not judged",
        "package.module:held_out_batches",
    ),
    "evaluate": (
        "Metrics of your own",
        "function of the network that returns {name: number}",
        "package.module:evaluate",
    ),
    "sample": ("Sample", "one batch of the shape that is served", "package.module:sample"),
    "loss": ("Loss", "scalar of (output, batch), for the Hessian metrics", "package.module:loss"),
    "profiles": (
        "Profiles",
        "further shapes that are served, as JSON",
        '{"prefill": {"tokens": 512}, "decode": {"tokens": 1, "weight": 64}}',
    ),
    "quality": ("Quality", "one 'name = function' a line", "answers = package.module:quality"),
    "quality_groups": (
        "Quality groups",
        "which units each quality scores: auto, or JSON",
        '{"answers": ["decoder.*"]}',
    ),
    "budgets": (
        "Budgets",
        "one a line; all hold together",
        "memory <= 60%\nlatency <= 3 ms",
    ),
    "limits": ("Limits", "on metrics and qualities, one a line", "accuracy drop <= 1%"),
    "minimise": (
        "Minimise instead of the loss",
        "a cost, or weights of costs as JSON; needs a limit",
        "memory",
    ),
    "risk": (
        "Probability that budgets on measured times hold",
        "0.5 takes the times as they are",
        "0.95",
    ),
    "schemes": (
        "Schemes",
        "one a line; none: what the hardware runs",
        "int8\nint4g64\nint8:int8",
    ),
    "hardware": (
        "Hardware",
        "local: this machine, measured; roofline:NAME: a model of another",
        "local",
    ),
    "skip": ("Leave out", "layer names or patterns, one a line", "*.head"),
    "pin": ("Pin", "one 'layer = scheme' a line; layers may be patterns", "lm_head = int8"),
    "embeddings": ("Search embeddings too", "", ""),
    "kv_cache": (
        "Search KV caches too",
        "true: as large as the sample's; or JSON",
        '{"context": 4096, "batch": 8}',
    ),
    "kv_schemes": (
        "Schemes of caches",
        "one a line; none: 16 bits, int8, int4 in groups",
        "bf16\nint8\nint4g32",
    ),
    "activations": ("Activations", "tied: a scheme has them; apart: searched by themselves", ""),
    "activation_schemes": (
        "Schemes of inputs",
        "where apart; one a line; none: fp32, int8, int6, int4",
        "fp32\nint8",
    ),
    "groups": (
        "Units",
        "auto, none, or further groups of layers as JSON",
        '[["layer.a", "layer.b"]]',
    ),
    "clip": ("Range of weights", "how it is cut", ""),
    "on_indivisible": ("Groups that do not divide", "refused, or a scale for each channel", ""),
    "metric": ("Metric", "what scores layers", ""),
    "solver": ("Solver", "what chooses", ""),
    "divergence": ("Divergence", "how outputs are compared", ""),
    "refine": ("Refinement steps", "measure and improve the best answer so often", ""),
    "seed": ("Seed", "of every random draw", ""),
    "num_probes": ("Probes", "random vectors a calibration sample", ""),
    "precision": (
        "Score until",
        "a relative standard error, or settled; none: all samples",
        "0.05",
    ),
    "latency_seconds": ("Time for timing kernels, s", "", ""),
    "metric_seconds": ("Time for the metric auto, s", "", ""),
    "num_trials": ("Trials", "of solvers that measure", ""),
    "trial_seconds": ("Time for trials, s", "", ""),
    "executor": ("Executor", "ray: several processes; serial: one", ""),
    "num_workers": ("Workers", "none: one for each processor", ""),
    "ray_address": ("Ray cluster", "host:port, or auto; none: a local Ray", "auto"),
    "worker_resources": ("What a worker takes", "of Ray, beside one CPU; as JSON", '{"gpu": 1}'),
    "task_tries": ("Tries of a task", "before it counts as failed", ""),
    "task_grace_seconds": ("A task hangs after, s", "or 20 times the median task", ""),
    "study": ("Optuna study", "URL of a database for its trials", ""),
}
_HIDDEN = ("version",)


@functools.cache
def sections() -> tuple[Section, ...]:
    """Return every key of the schema of jobs in its place; a new one is among the rare ones."""
    schema = json.loads(job_schema())
    fields = {
        key: _field(key, part, schema["required"])
        for key, part in schema["properties"].items()
        if key not in _HIDDEN
    }
    placed = {key for _, often, rare in _ORDER for key in (*often, *rare)}
    words = list(_WORDS)
    others = [key for key in fields if key not in placed]
    others.sort(key=lambda key: words.index(key) if key in words else len(words))
    made = [
        Section(
            title=title,
            fields=tuple(fields[key] for key in often),
            rare=tuple(fields[key] for key in rare),
        )
        for title, often, rare in _ORDER[:-1]
    ]
    title, often, _ = _ORDER[-1]
    last = Section(
        title=title,
        fields=tuple(fields[key] for key in often),
        rare=tuple(fields[key] for key in others),
    )
    return (*made, last)


def all_fields() -> dict[str, Field]:
    """Return the fields by key."""
    return {f.key: f for part in sections() for f in (*part.fields, *part.rare)}


def _field(key: str, part: Mapping[str, Any], required: list[str]) -> Field:
    label, hint, example = _WORDS.get(key, (part.get("title", key), "", ""))
    choices = tuple(part.get("enum", ()))
    return Field(
        key=key,
        kind=_kind(part),
        label=label,
        hint=hint,
        example=example,
        default=_told(part.get("default")),
        choices=choices or job_names().get(key, ()),
        is_required=key in required,
    )


def _kind(part: Mapping[str, Any]) -> Kind:
    kinds = [one for one in part.get("anyOf", [part]) if one.get("type") != "null"]
    if len(kinds) > 1:
        return "value"
    kind, items = kinds[0].get("type"), kinds[0].get("items", {})
    if "enum" in kinds[0]:
        return "choice"
    if kind == "array" and items.get("type") == "string":
        return "lines"
    if kind == "object" and kinds[0].get("additionalProperties", {}).get("type") == "string":
        return "pairs"
    simple: dict[Any, Kind] = {
        "boolean": "check",
        "integer": "number",
        "number": "number",
        "string": "line",
    }
    return simple.get(kind, "value")


def _told(default: Any) -> str:
    if default is None or isinstance(default, bool | list | dict):
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)
