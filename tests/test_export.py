"""Allocations written for every target: rules before anything is written, and back again."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

import mpq.export
from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.core.layers import LayerGraph, Unit
from mpq.core.problem import Budget
from mpq.export import EXPORTERS, export_allocation, get_exporter, import_allocation
from mpq.export.allocation_json import json_schema
from mpq.export.rules import nearest, runnable
from tests.builders import layer, llama_graph
from tests.contracts import exporter_contract

GRAPH = llama_graph()
SEARCHED = [name for unit in GRAPH.units for name in unit.layers]
EVERY = {"mpq", "compressed-tensors-hf", "torchao", "torchao-hf"}  # hundreds of schemes: some


def allocated(graph: LayerGraph = GRAPH, default: str = "fp32", **changes: str) -> Chosen:
    """Every searched layer in one scheme, but those whose names end with a key ("__" is a dot)."""
    schemes = {name: default for unit in graph.units for name in unit.layers}
    for end, text in changes.items():
        named = [name for name in schemes if name.endswith(end.replace("__", "."))]
        assert named
        schemes |= dict.fromkeys(named, text)
    return Chosen(graph=graph, schemes={n: parse_scheme(text) for n, text in schemes.items()})


def single(kind: str, shape: tuple[int, ...], text: str, **changes: object) -> Chosen:
    one = layer("blocks.0.fc1", shape, kind, **changes)
    unit = Unit(name=one.name, layers=(one.name,))
    graph = LayerGraph(layers=(one,), units=(unit,), unsearched=(), sample="made")
    return allocated(graph, text)


# --- every target ----------------------------------------------------------------------------


@pytest.mark.parametrize("target", EXPORTERS)
def test_an_exporter_answers_to_its_name(target: str) -> None:
    exporter = get_exporter(target)
    assert exporter.name == target
    assert exporter.suffix.startswith(".")


def test_the_readme_lists_every_target() -> None:
    readme = (Path(mpq.export.__file__).parents[2] / "README.md").read_text("utf-8")
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    first = " ".join(row.split("|")[1] for row in rows)
    assert [target for target in EXPORTERS if f"`{target}`" not in first] == []


@pytest.mark.parametrize("target", EXPORTERS)
def test_every_scheme_that_runs_is_written_and_read_back(target: str) -> None:
    exporter = get_exporter(target)
    shared = set.intersection(*(set(runnable(exporter, GRAPH.by_name[n])) for n in SEARCHED))
    schemes = sorted(map(str, shared))
    assert len(schemes) >= 2
    quantized = 0
    for text in schemes if target not in EVERY else random.Random(0).sample(schemes, 40):
        chosen = allocated(default=text)
        if target == "gptqmodel" and parse_scheme(text).is_native:
            continue
        assert exporter_contract(exporter, chosen) is not None, text
        quantized += not parse_scheme(text).is_native
    assert quantized >= 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [t for t in EXPORTERS if t != "hawq"])
def test_mixed_allocations_are_written_and_read_back(target: str, seed: int) -> None:
    exporter, draw = get_exporter(target), random.Random(seed)
    schemes = {}
    for unit in GRAPH.units:
        shared = set.intersection(*(set(runnable(exporter, GRAPH.by_name[n])) for n in unit.layers))
        if target == "onnxruntime":  # one kind of activations in a file
            shared = {s for s in shared if not s.activations.symmetric or s.activations.is_native}
        schemes |= dict.fromkeys(unit.layers, draw.choice(sorted(shared, key=str)))
    chosen = Chosen(graph=GRAPH, schemes=schemes)
    assert exporter_contract(exporter, chosen) is not None


@pytest.mark.parametrize("target", EXPORTERS)
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("linear", (6, 10)),
        ("conv1d", (4, 3, 3)),
        ("conv2d", (16, 8, 3, 3)),
        ("conv_transpose2d", (8, 4, 2, 2)),
        ("embedding", (11, 64)),
        ("experts", (2, 8, 64)),
    ],
)
def test_every_kind_of_layer_is_written_or_refused(
    target: str, kind: str, shape: tuple[int, ...]
) -> None:
    one = single(kind, shape, "fp32")
    exporter = get_exporter(target, **({"names": {}} if target == "onnxruntime" else {}))
    texts = ("int1", "int3", "int4", "int8", "int8:int8", "int8t:int8s", "int4g32a", "bf16", "fp32")
    for text in texts:
        if target == "gguf" and not exporter.refusal(one.graph.layers[0], parse_scheme(text)):
            continue  # has no name for it: see below
        if target == "gptqmodel" and text == "fp32":
            continue
        exporter_contract(exporter, allocated(one.graph, text))


@pytest.mark.parametrize("target", EXPORTERS)
def test_no_file_of_a_target_is_one_line(target: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in ("{}", "[]", "x = 1", "nonsense", '{"quantization_config": 3}', "\x00"):
        path.write_text(content)
        with pytest.raises(InvalidInputError) as caught:
            import_allocation(target, path, GRAPH)
        assert "\n" not in str(caught.value)
    with pytest.raises(InvalidInputError, match="cannot read"):
        import_allocation(target, tmp_path / "absent", GRAPH)


@pytest.mark.parametrize("target", EXPORTERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(target: str, tmp_path: Path) -> None:
    path, draw = tmp_path / "file", random.Random(0)
    uniform = {"hawq": "int8:int8", "onnxruntime": "int8:int8", "nncf": "int4"}
    chosen = allocated(
        default=uniform.get(target, "int4g64" if "modelopt" in target else "int4g32")
    )
    whole = export_allocation(target, chosen, path).read_text()
    refused = []
    for _ in range(100):
        at, size = draw.randrange(len(whole)), draw.choice((1, 3, 20))
        other = draw.choice(("", "3", '"', "[", "null", "*", "(", "fc"))
        path.write_text(whole[:at] + other + whole[at + size :])
        try:
            import_allocation(target, path, GRAPH)
        except InvalidInputError as error:
            refused.append(str(error))
    assert len(refused) >= 20
    assert not any("\n" in message for message in refused)


def test_an_unknown_target_is_told_with_the_nearest() -> None:
    with pytest.raises(InvalidInputError, match="did you mean 'torchao'"):
        export_allocation("torch-ao", allocated(), "x")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"cannot write .*absent"):
        export_allocation("mpq", allocated(), tmp_path / "absent" / "file.json")


def test_the_default_path_is_named_after_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export_allocation("nncf", allocated(default="int8")) == Path("mpq-nncf.py")
    assert (tmp_path / "mpq-nncf.py").is_file()


def test_a_file_for_another_network_names_what_it_does_not_have(tmp_path: Path) -> None:
    larger, smaller = llama_graph(blocks=2), llama_graph(blocks=1)
    for target in EXPORTERS:
        if target in ("modelopt-hf", "hawq"):  # may say one thing of all, or of other modules
            continue
        text = "int8:int8" if target == "onnxruntime" else "int4g32"
        chosen = allocated(larger, text, layers__1__mlp__down_proj="fp32")
        if target == "mpq":
            chosen = allocated(larger, "int4g32")
        path = export_allocation(target, chosen, tmp_path / target)
        with pytest.raises(InvalidInputError) as caught:
            import_allocation(target, path, smaller)
        assert re.search(r"layers\\*\.1|blk\\*\.1", str(caught.value)), (target, caught.value)


@pytest.mark.parametrize("target", ["mpq", "compressed-tensors", "gguf", "nncf"])
def test_the_name_of_a_wrapper_is_taken_off(target: str, tmp_path: Path) -> None:
    wrapped = replace(
        GRAPH,
        layers=tuple(
            replace(la, name=f"net.{la.name}", weight_id=f"net.{la.weight_id}")
            for la in GRAPH.layers
        ),
        units=tuple(
            Unit(name=f"net.{unit.name}", layers=tuple(f"net.{name}" for name in unit.layers))
            for unit in GRAPH.units
        ),
    )
    text = "int4" if target == "nncf" else "int4g32"
    pinned = frozenset({"net.model.layers.0.mlp.down_proj"})
    chosen = replace(allocated(wrapped, text, layers__1__mlp__down_proj="fp32"), pinned=pinned)
    path = export_allocation(target, chosen, tmp_path / "file", strip="net.")
    assert "net." not in path.read_text()
    plain = allocated(GRAPH, text, layers__1__mlp__down_proj="fp32").schemes
    assert import_allocation(target, path, GRAPH) == plain
    assert import_allocation(target, path, wrapped, strip="net.") == chosen.schemes
    with pytest.raises(InvalidInputError, match=r"no layer's name starts with 'other\.'"):
        export_allocation(target, chosen, tmp_path / "file", strip="other.")


# --- rules -----------------------------------------------------------------------------------

LINEAR, K_LINEAR, CONV = (
    ("linear", (64, 96)),
    ("linear", (64, 256)),
    ("conv2d", (8, 8, 3, 3)),
)


@pytest.mark.parametrize(
    ("target", "shape", "text", "rule", "near"),
    [
        ("gguf", LINEAR, "int3", "has q8_0 .*, q4_0 .* for 96 columns", "int4g32"),
        ("gguf", K_LINEAR, "int3", "q3_K \\(int3g16, 3.4375 bits\\)", "int3g16"),
        ("gguf", LINEAR, "int6g16", "q6_K in blocks of 256, not for 96 columns", "int5g32"),
        ("gguf", LINEAR, "int8g32:int8", "no types for activations", "int8g32"),
        ("compressed-tensors", K_LINEAR, "int3", "kernels for 4 and 8 bits", "int4"),
        ("compressed-tensors", K_LINEAR, "int4g16", "groups of 32, 64 and 128", "int4g32"),
        ("compressed-tensors", K_LINEAR, "int8a", "zero points for 4 bits only", "int8"),
        ("compressed-tensors", K_LINEAR, "int4:int8", "int8:int8 only", "int8:int8"),
        ("compressed-tensors", K_LINEAR, "int8a:int8", "symmetric weights", "int8:int8"),
        ("compressed-tensors", K_LINEAR, "int4t", "per channel and per group", "int4"),
        ("compressed-tensors", CONV, "int8", "linear layers, this is of kind conv2d", "fp32"),
        ("compressed-tensors", K_LINEAR, "bf16", "or leaves it as it is \\(fp32\\)", "fp32"),
        ("compressed-tensors-hf", K_LINEAR, "int1", "2 to 8 bits", "int2"),
        ("compressed-tensors-hf", K_LINEAR, "int4ta", "per channel or per group", "int4a"),
        ("torchao", CONV, "int4g9", "convolutions per channel", "int4"),
        ("torchao", K_LINEAR, "int4t", "one scale per tensor for symmetric int8", "int4"),
        ("torchao", K_LINEAR, "int4:int4", "activations of 8 bits", "int4"),
        ("torchao", K_LINEAR, "int1", "a zero in its symmetric 1-bit grid", "int1a"),
        ("gptqmodel", K_LINEAR, "int8:int8", "weights only", "int8"),
        ("gptqmodel", LINEAR, "int4g48", "groups of 16, 32, 64", "int4g32"),
        ("modelopt", K_LINEAR, "int4a", "no zero points", "int4"),
        ("modelopt", K_LINEAR, "int8:int8", "symmetric activations only", "int8:int8s|int8"),
        ("modelopt-hf", K_LINEAR, "int4", "W8A16 \\(int8\\), .*W4A16_AWQ", "int4g128"),
        ("onnxruntime", K_LINEAR, "int4", "blocks of 16 to 256", "int4g256"),
        ("onnxruntime", CONV, "int4", "weight-only kernels for matrices", "fp32"),
        ("onnxruntime", CONV, "int4:int8", "int8:int8 without groups", "int8:int8"),
        ("nncf", K_LINEAR, "int6", "4 and 8 bits", "int8"),
        ("nncf", K_LINEAR, "int8g64", "8 bits per channel", "int8"),
        ("nncf", CONV, "int4", "4 bits for linear layers", "int8"),
        ("hawq", K_LINEAR, "int8", "leaves no layer as it is", "int8:int8"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    tmp_path: Path, target: str, shape: tuple[str, tuple[int, ...]], text: str, rule: str, near: str
) -> None:
    chosen = single(*shape, text)
    with pytest.raises(InvalidInputError, match=rule) as caught:
        export_allocation(target, chosen, tmp_path / "file")
    message = str(caught.value)
    assert message.startswith(f"layer 'blocks.0.fc1' is {text}: {target} ")
    assert re.search(f"; nearest: ({near})$", message), message
    assert list(tmp_path.iterdir()) == []


def test_groups_that_do_not_divide_are_refused_everywhere() -> None:
    for target in set(EXPORTERS) - {"hawq"}:
        with pytest.raises(InvalidInputError, match="group size 64 does not divide the 96"):
            export_allocation(target, single("linear", (64, 96), "int4g64"))


def test_the_nearest_has_the_nearest_bits_and_rather_more() -> None:
    exporter, one = get_exporter("compressed-tensors"), layer("fc", (64, 256))
    for text, near in (("int6", "int8"), ("int5", "int4"), ("int3g32", "int4g32")):
        assert str(nearest(exporter, one, parse_scheme(text))) == near


@pytest.mark.parametrize("target", ["compressed-tensors", "gptqmodel", "modelopt"])
def test_layers_that_the_target_fuses_share_a_scheme(target: str, tmp_path: Path) -> None:
    apart = replace(GRAPH, units=tuple(Unit(name=n, layers=(n,)) for n in SEARCHED))
    mixed = allocated(apart, "int4g32", layers__1__self_attn__k_proj="int8")
    with pytest.raises(InvalidInputError, match=r"runs fused q/k/v as one kernel.*int8 for all"):
        export_allocation(target, mixed, tmp_path / "file")
    mixed = allocated(apart, "int4g32", layers__0__mlp__up_proj="fp32")
    with pytest.raises(InvalidInputError, match=r"'model.layers.0.mlp.up_proj' is fp32.*gate/up"):
        export_allocation(target, mixed, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    export_allocation(target, allocated(apart, "int4g32"), tmp_path / "file")
    export_allocation("torchao", mixed, tmp_path / "file")


def test_vllm_keeps_the_head() -> None:
    graph = replace(
        GRAPH, units=(*GRAPH.units, Unit(name="lm_head", layers=("lm_head",))), unsearched=()
    )
    with pytest.raises(
        InvalidInputError, match=r"layer 'lm_head' is int8: .*keeps the output head"
    ):
        export_allocation("compressed-tensors", allocated(graph, "int8"))


def test_tied_layers_have_no_quantized_weight_of_their_own() -> None:
    tied = layer("second", (64, 256), weight_id="first.weight")
    unit = Unit(name="both", layers=("first", "second"))
    graph = LayerGraph(
        layers=(layer("first", (64, 256)), tied), units=(unit,), unsearched=(), sample="made"
    )
    with pytest.raises(InvalidInputError, match=r"layer 'second' is int8.*tied to 'first'"):
        export_allocation("compressed-tensors-hf", allocated(graph, "int8"))


def test_an_allocation_is_over_the_searched_layers() -> None:
    with pytest.raises(InvalidInputError, match=r"'model.layers.0.mlp.down_proj' is missing"):
        Chosen(graph=GRAPH, schemes={})
    everything = {la.name: parse_scheme("int8") for la in GRAPH.layers}
    with pytest.raises(InvalidInputError, match="'lm_head' is not searched"):
        Chosen(graph=GRAPH, schemes=everything)


# --- our own file ----------------------------------------------------------------------------


def whole() -> Chosen:
    return replace(
        allocated(default="int4g32:int8", down_proj="int6a"),
        pinned=frozenset({"model.layers.0.mlp.down_proj"}),
        budgets=(Budget("memory", 1e6, "memory <= 1 MB"),),
        totals={"memory": 9e5, "latency": 3e-3},
        cost_units={"memory": "bytes", "latency": "s"},
        provenance={"run": "abc", "score": 0.25, "bound": None},
    )


def test_the_committed_schema_is_current() -> None:
    committed = Path(mpq.export.__file__).parent / "allocation.schema.json"
    assert committed.read_text("utf-8") == json_schema()
    jsonschema.Draft202012Validator.check_schema(json.loads(json_schema()))


def test_our_file_holds_all_that_is_known_and_fits_its_schema(tmp_path: Path) -> None:
    path = export_allocation("mpq", whole(), tmp_path / "a.json")
    made = json.loads(path.read_text())
    jsonschema.validate(made, json.loads(json_schema()))
    assert (made["format"], made["version"]) == ("mpq-allocation", 1)
    first = made["layers"][0]
    assert first["name"] == "model.layers.0.self_attn.q_proj"
    assert (first["shape"], first["scheme"]) == ([256, 256], "int4g32:int8")
    groups = {group["name"]: group for group in made["groups"]}
    assert groups[first["group"]]["layers"] == SEARCHED[:3]
    assert [name for name, g in groups.items() if g["pinned"]] == ["model.layers.0.mlp.down_proj"]
    assert made["budgets"] == [
        {"cost": "memory", "limit": 1e6, "unit": "bytes", "text": "memory <= 1 MB"}
    ]
    assert made["totals"]["latency"] == {"value": 3e-3, "unit": "s"}
    assert made["provenance"] == {"run": "abc", "score": 0.25, "bound": None}
    assert import_allocation("mpq", path, GRAPH) == whole().schemes


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": 2}, "version: Input should be 1"),
        ({"format": "other"}, "format: Input should be 'mpq-allocation'"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"layers": [{"name": "a"}]}, "layers.0.kind: Field required"),
    ],
)
def test_another_file_is_refused_by_schema_and_reader(
    tmp_path: Path, change: dict[str, object], told: str
) -> None:
    path = export_allocation("mpq", whole(), tmp_path / "a.json")
    made = json.loads(path.read_text()) | change
    path.write_text(json.dumps(made))
    with pytest.raises(InvalidInputError, match=re.escape(told)):
        import_allocation("mpq", path, GRAPH)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(made, json.loads(json_schema()))


def test_a_file_for_other_shapes_is_refused(tmp_path: Path) -> None:
    path = export_allocation("mpq", whole(), tmp_path / "a.json")
    with pytest.raises(InvalidInputError, match=r"shape \[256, 256\] in the file and \[128, 128\]"):
        import_allocation("mpq", path, llama_graph(width=128))
