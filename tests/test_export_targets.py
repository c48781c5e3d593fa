"""What the files of single targets say, to their own readers where those are light enough.

gguf and onnxruntime are asked themselves here (compressed-tensors and torchao in files of their
own). GPTQModel, ModelOpt, NNCF and HAWQ are too heavy or not on PyPI: their rules for reading a
file are written down again below, each with its source.
"""

from __future__ import annotations

import fnmatch
import json
import re
import sys
import types
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpq.core.chosen import Chosen
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.core.layers import LayerGraph, Unit
from mpq.export import export_allocation, get_exporter, import_allocation
from mpq.export.gguf import gguf_names
from mpq.export.modelopt import literal
from mpq.export.onnxruntime import OnnxName
from tests.builders import layer, llama_graph
from tests.test_export import GRAPH, SEARCHED, allocated

BLOCK = "model.layers.0"


def graph_of(*names: str, shape: tuple[int, ...] = (64, 256), kind: str = "linear") -> LayerGraph:
    return LayerGraph(
        layers=tuple(layer(name, shape, kind) for name in names),
        units=tuple(Unit(name=name, layers=(name,)) for name in names),
        unsearched=(),
        sample="made",
    )


def read(target: str, path: Path, text: str, graph: LayerGraph = GRAPH) -> dict[str, str]:
    """Return the schemes that a file of these lines gives, without the layers it leaves alone."""
    path.write_text(text)
    found = import_allocation(target, path, graph)
    return {name: str(scheme) for name, scheme in found.items() if not scheme.is_native}


# --- GGUF ------------------------------------------------------------------------------------


def test_lines_name_the_tensors_of_llama_cpp() -> None:
    lines = get_exporter("gguf").text(allocated(default="int4g32", down_proj="int6g16"))
    assert "^blk\\.1\\.ffn_down\\.weight$=q6_K\n" in lines
    assert "^blk\\.0\\.attn_q\\.weight$=q4_0\n" in lines
    assert len(lines.splitlines()) == len(SEARCHED)
    assert not re.search(r"[^\S\n]", lines)


def test_names_are_those_of_the_library() -> None:
    names = gguf_names(GRAPH)
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert names == {name: f"{theirs.get_name(name)}.weight" for name in SEARCHED}
    assert names == gguf_names(GRAPH, "llama")
    bert = graph_of("encoder.layer.3.attention.self.query", "encoder.layer.3.output.dense")
    assert list(gguf_names(bert).values()) == ["blk.3.attn_q.weight", "blk.3.ffn_down.weight"]
    bare = graph_of("layers.0.self_attn.q_proj")  # the model without its head
    assert list(gguf_names(bare).values()) == ["blk.0.attn_q.weight"]


def test_a_network_that_llama_cpp_does_not_know_is_refused() -> None:
    odd = graph_of("model.layers.0.mlp.down_proj", "stage1.unit1.convbn1")
    with pytest.raises(InvalidInputError, match=r"'stage1.unit1.convbn1' has no GGUF name in any"):
        get_exporter("gguf").text(allocated(odd, "int4g32"))
    with pytest.raises(InvalidInputError, match="no GGUF name in architecture 'bloom'"):
        gguf_names(GRAPH, "bloom")
    with pytest.raises(InvalidInputError, match="did you mean 'llama'"):
        gguf_names(GRAPH, "lama")


def test_of_several_lines_the_first_wins(tmp_path: Path) -> None:
    lines = "blk\\.0\\.ffn_down=Q6_K ffn_down=q4_1\n^blk\\.1\\.attn_(q|k|v)\\.weight$=q8_0"
    assert read("gguf", tmp_path / "types", lines) == {
        f"{BLOCK}.mlp.down_proj": "int6g16",
        "model.layers.1.mlp.down_proj": "int4g32a",
        **{f"model.layers.1.self_attn.{p}_proj": "int8g32" for p in "qkv"},
    }


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("ffn_down=iq4_xs", "unknown GGUF type 'iq4_xs'"),
        ("ffn_dwn=q4_0", "'ffn_dwn' matches no tensor"),
        ("ffn_down", "a line is NAME=TYPE"),
    ],
)
def test_lines_that_say_nothing_are_refused(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(InvalidInputError, match=told):
        read("gguf", tmp_path / "types", line)


# --- compressed-tensors ----------------------------------------------------------------------


def groups_file(*targets: list[str], ignore: tuple[str, ...] = (), **args: object) -> str:
    groups = {
        f"group_{number}": {
            "targets": names,
            "weights": {"num_bits": 4 * (number + 1), "strategy": "channel", **args},
        }
        for number, names in enumerate(targets)
    }
    return json.dumps({"config_groups": groups, "ignore": list(ignore)})


def test_exact_targets_beat_patterns_and_those_beat_classes(tmp_path: Path) -> None:
    exact, pattern = [f"{BLOCK}.mlp.down_proj"], ["re:.*mlp.*", "Linear"]
    text = groups_file(pattern, exact, ignore=("re:.*q_proj",))
    found = read("compressed-tensors-hf", tmp_path / "config.json", text)
    assert found.pop(exact[0]) == "int8"
    assert set(found.values()) == {"int4"}
    assert set(SEARCHED) - set(found) - set(exact) == {
        name for name in SEARCHED if name.endswith("q_proj")
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (groups_file(["Linear"], type="float"), "no scheme stands for float values"),
        (groups_file(["Linear"], strategy="block"), "strategy 'block'"),
        (groups_file(["model.layer.0"]), "target 'model.layer.0' matches no layer"),
        ('{"config_groups": {"W4A16": ["Linear"]}}', "'W4A16' is a preset"),
        ('{"config_groups": {"g": {"targets": ["Linear"]}}}', "no file of compressed-tensors"),
    ],
)
def test_groups_that_no_scheme_stands_for_are_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InvalidInputError, match=told):
        read("compressed-tensors", tmp_path / "config.json", text)


def test_vllm_is_told_of_every_linear_layer() -> None:
    made = json.loads(get_exporter("compressed-tensors").text(allocated(default="int4g32")))
    config = made["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    assert config["config_groups"]["group_0"]["targets"] == SEARCHED
    assert (config["format"], config["quantization_status"]) == ("pack-quantized", "compressed")


def test_formats_of_groups_are_mixed_only_where_they_differ() -> None:
    exporter = get_exporter("compressed-tensors")
    for other, wanted in (("int8", "pack-quantized"), ("int8:int8", "mixed-precision")):
        made = json.loads(exporter.text(allocated(default="int4g32", down_proj=other)))
        assert made["quantization_config"]["format"] == wanted
        assert len(made["quantization_config"]["config_groups"]) == 2
    made = json.loads(exporter.text(allocated()))
    assert made["quantization_config"]["format"] == "dense"


# --- torchao ---------------------------------------------------------------------------------


def fqn_file(**changes: object) -> str:
    data = {
        "weight_dtype": {"_type": "torch.dtype", "_data": "int4"},
        "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
    }
    four = {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}
    eight = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}
    named = {"four": four, "eight": eight, "none": None, "fp8": {"_type": "Fp8", "_data": {}}}
    configs = {key: named[str(value)] for key, value in changes.items()}
    return json.dumps({"_type": "FqnToConfig", "_data": {"fqn_to_config": configs}})


def test_keys_of_parameters_and_modules_beat_patterns(tmp_path: Path) -> None:
    down, gate = f"{BLOCK}.mlp.down_proj", f"{BLOCK}.mlp.gate_proj"
    keys = {"re:.*mlp.*": "eight", f"{down}.weight": "four", down: "eight", gate: "none"}
    found = read("torchao", tmp_path / "f", fqn_file(**keys))
    assert found[down] == "int4g32"
    assert gate not in found
    assert found["model.layers.1.mlp.up_proj"] == "int8"
    assert set(read("torchao", tmp_path / "f", fqn_file(_default="four"))) == set(SEARCHED)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"re:.*ffn": "four"}, "key 're:.*ffn' matches no layer"),
        ({f"{BLOCK}.mlp.down_proj": "fp8"}, "no scheme stands for Fp8"),
    ],
)
def test_keys_that_say_nothing_are_refused(
    tmp_path: Path, keys: Mapping[str, str], told: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(told)):
        read("torchao", tmp_path / "f", fqn_file(**keys))


# --- GPTQModel -------------------------------------------------------------------------------


def gptqmodel_override(config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Read `dynamic` as GPTQModel 7.7 does: `_resolve_dynamic_override` in quantization/config.py.

    Rules that leave layers alone are moved to the front, the first that matches from the start of
    the name wins; None: the layer is left alone.
    """
    rules = config["dynamic"]
    for rule in sorted(rules, key=lambda rule: not rule.startswith("-")):
        if re.match(rule.removeprefix("+:").removeprefix("-:"), name):
            return None if rule.startswith("-") else {**config, **rules[rule]}
    return dict(config)


def test_gptqmodel_finds_the_scheme_of_every_linear_layer() -> None:
    graph = llama_graph(blocks=12)  # layers.1 and layers.11: patterns have ends
    chosen = allocated(
        graph, "int4g128", layers__1__mlp__down_proj="int8a", layers__11__self_attn__o_proj="fp32"
    )
    config = json.loads(get_exporter("gptqmodel").text(chosen))
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 128, True)
    assert config["format"] == "gptq_v2"
    for one in graph.layers:
        if one.kind == "linear":
            found, wanted = gptqmodel_override(config, one.name), chosen.schemes.get(one.name)
            if wanted is None or wanted.is_native:
                assert found is None
            else:
                assert found is not None
                assert found["bits"] == wanted.weights.bits
                assert found["sym"] == wanted.weights.symmetric


@pytest.mark.parametrize(("text", "form"), [("int3", "gptq"), ("int4a", "gptq_v2")])
def test_one_planar_layer_makes_the_checkpoint_planar(text: str, form: str) -> None:
    exporter = get_exporter("gptqmodel")
    assert json.loads(exporter.text(allocated(default=text)))["format"] == form
    mixed = allocated(default=text, layers__0__mlp__down_proj="int5")
    assert json.loads(exporter.text(mixed))["checkpoint_format"] == "gptq_p"


def test_gptqmodel_needs_something_to_quantize() -> None:
    with pytest.raises(InvalidInputError, match="at least one quantized layer"):
        get_exporter("gptqmodel").text(allocated())


# --- ModelOpt --------------------------------------------------------------------------------


def modelopt_quantizer(config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Read `quant_cfg` as ModelOpt 0.47 documents it (QuantizerCfgEntry in quantization/config.py).

    Entries are applied in order to every quantizer whose name matches the shell pattern; a later
    one replaces the attributes and switches on or off. None: it is off.
    """
    attributes: dict[str, Any] | None = None
    enabled = True
    for entry in config["quant_cfg"]:
        assert set(entry) <= {"quantizer_name", "parent_class", "cfg", "enable"}
        assert entry.get("cfg") or entry["enable"] is False  # an empty cfg is rejected
        if fnmatch.fnmatch(name, entry["quantizer_name"]):
            attributes, enabled = entry.get("cfg", attributes), entry.get("enable", True)
    return attributes if enabled else None


def test_modelopt_switches_on_what_was_chosen_and_nothing_else() -> None:
    chosen = allocated(default="int4g128", down_proj="int8:int8s", o_proj="fp32", q_proj="int3t")
    config = literal(get_exporter("modelopt").text(chosen), "CONFIG")
    assert config["quant_cfg"][0] == {"quantizer_name": "*", "enable": False}
    on = {name: modelopt_quantizer(config, f"{name}.weight_quantizer") for name in SEARCHED}
    assert on[f"{BLOCK}.self_attn.o_proj"] is None
    assert on[f"{BLOCK}.self_attn.q_proj"] == {"num_bits": 3, "axis": None}
    assert on[f"{BLOCK}.mlp.down_proj"] == {"num_bits": 8, "axis": 0}
    assert on[f"{BLOCK}.mlp.up_proj"] == {
        "num_bits": 4,
        "block_sizes": {-1: 128, "type": "static"},
    }
    inputs = modelopt_quantizer(config, f"{BLOCK}.mlp.down_proj.input_quantizer")
    assert inputs == {"num_bits": 8, "axis": None, "type": "dynamic"}
    for off in ("lm_head.weight_quantizer", f"{BLOCK}.mlp.up_proj.input_quantizer"):
        assert modelopt_quantizer(config, off) is None


def test_hf_quant_config_names_one_algorithm_or_that_of_each_layer() -> None:
    """Fields as process_layer_quant_config of ModelOpt 0.47 (torch/export/quant_utils.py)."""
    exporter = get_exporter("modelopt-hf")
    one = json.loads(exporter.text(allocated(default="int4g128")))["quantization"]
    awq = {"group_size": 128, "has_zero_point": False, "pre_quant_scale": True}
    assert one == {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": None,
        **awq,
        "exclude_modules": ["lm_head"],
    }
    mixed = json.loads(exporter.text(allocated(default="int4g128", down_proj="int8:int8s")))
    layers = mixed["quantization"]["quantized_layers"]
    assert mixed["quantization"]["quant_algo"] == "MIXED_PRECISION"
    assert layers[f"{BLOCK}.mlp.down_proj"] == {"quant_algo": "W8A8_SQ_PER_CHANNEL"}
    assert layers[f"{BLOCK}.mlp.up_proj"] == {"quant_algo": "W4A16_AWQ", **awq}


# --- ONNX Runtime ----------------------------------------------------------------------------


def onnx_file(path: Path) -> dict[str, np.ndarray]:
    """Two Gemms and a MatMul whose weight lies the other way round, as exporters write them."""
    draw = np.random.default_rng(0)
    weights = {
        "first.weight": draw.normal(size=(48, 32)).astype(np.float32),
        "turned": draw.normal(size=(48, 64)).astype(np.float32),
        "last.weight": draw.normal(size=(8, 64)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "first.weight"], ["a"], "first", transB=1),
        helper.make_node("MatMul", ["a", "turned"], ["b"], "/middle/MatMul"),
        helper.make_node("Gemm", ["b", "last.weight"], ["y"], "last", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 8])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return weights


ONNX_GRAPH = LayerGraph(
    layers=(layer("first", (48, 32)), layer("middle", (64, 48)), layer("last", (8, 64))),
    units=tuple(Unit(name=n, layers=(n,)) for n in ("first", "middle", "last")),
    unsearched=(),
    sample="made",
)
ONNX_NAMES = {"middle": OnnxName("turned", "/middle/MatMul", 1)}


def quantize_onnx(options: Mapping[str, Any], path: Path) -> onnx.ModelProto:
    """Do with ONNX Runtime what a file of options says."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": np.ones((4, 32), np.float32) * k} for k in (-1, 1)]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    static = options["quantize_static"]
    overrides = static["extra_options"]["TensorQuantOverrides"]
    for override in (o for overridden in overrides.values() for o in overridden):
        override["quant_type"] = QuantType.from_string(override["quant_type"])
    out = path.with_name("static.onnx")
    quantize_static(
        path,
        out,
        Reader(),
        activation_type=QuantType.from_string(static["activation_type"]),
        nodes_to_exclude=static["nodes_to_exclude"],
        extra_options=static["extra_options"],
    )
    model = onnx.load(out)
    for options_of_pass in options["matmul_nbits"]:
        quantizer = MatMulNBitsQuantizer(model, **options_of_pass)
        quantizer.process()
        model = quantizer.model.model
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("texts", "kinds"),
    [
        (("int8:int8", "int4g16", "fp32"), {"MatMulNBits": [(4, 16)], "int8": 1, "uint8": 0}),
        (("int8a:int8", "int8:int8", "int8t:int8"), {"MatMulNBits": [], "int8": 2, "uint8": 1}),
        (("fp32", "int8g16a", "int8:int8s"), {"MatMulNBits": [(8, 16)], "int8": 1, "uint8": 0}),
        (("fp32", "fp32", "fp32"), {"MatMulNBits": [], "int8": 0, "uint8": 0}),
    ],
)
def test_onnxruntime_quantizes_what_was_chosen(
    tmp_path: Path, texts: tuple[str, ...], kinds: Mapping[str, Any]
) -> None:
    path = tmp_path / "net.onnx"
    weights = onnx_file(path)
    schemes = {la.name: parse_scheme(t) for la, t in zip(ONNX_GRAPH.layers, texts, strict=True)}
    chosen = Chosen(graph=ONNX_GRAPH, schemes=schemes)
    options = export_allocation("onnxruntime", chosen, tmp_path / "options", names=ONNX_NAMES)
    assert import_allocation("onnxruntime", options, ONNX_GRAPH, names=ONNX_NAMES) == schemes
    model = quantize_onnx(json.loads(options.read_text()), path)
    nodes = [
        {a.name: helper.get_attribute_value(a) for a in node.attribute}
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    ]
    assert [(node["bits"], node["block_size"]) for node in nodes] == kinds["MatMulNBits"]
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    codes = [stored[f"{name}_quantized"] for name in weights if f"{name}_quantized" in stored]
    types = [tensor.data_type for tensor in codes]
    assert types.count(TensorProto.INT8) == kinds["int8"]
    assert types.count(TensorProto.UINT8) == kinds["uint8"]
    for name, scheme, axis in zip(weights, schemes.values(), (0, 1, 0), strict=True):
        if scheme.activations.is_native:
            continue
        scales = numpy_helper.to_array(stored[f"{name}_scale"])
        per_tensor = str(scheme).startswith("int8t")
        assert scales.shape == (() if per_tensor else (weights[name].shape[axis],))


def test_onnxruntime_has_one_type_of_activations() -> None:
    schemes = dict(
        zip(("first", "middle", "last"), ("int8:int8", "int8:int8s", "fp32"), strict=True)
    )
    chosen = Chosen(graph=ONNX_GRAPH, schemes={n: parse_scheme(t) for n, t in schemes.items()})
    with pytest.raises(InvalidInputError, match=r"'middle' is int8:int8s: .* one activation type"):
        get_exporter("onnxruntime").text(chosen)


# --- NNCF ------------------------------------------------------------------------------------


def test_the_nncf_script_compresses_each_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the script on a stand-in that keeps the options and ignores as NNCF 3.4 does.

    Nodes are named as OpenVINO 2026 names those it converts from PyTorch; ignored are those that
    `re.Pattern.match` (nncf/scopes.py), a layer also where its constant is.
    """
    graph = llama_graph(blocks=12)
    searched = [name for unit in graph.units for name in unit.layers]
    mixed = {"layers__1__mlp__down_proj": "int8", "layers__11__self_attn__o_proj": "fp32"}
    chosen = allocated(
        graph, "int4g32", **mixed, gate_proj="int8a", up_proj="int8a", k_proj="int4a"
    )
    compressed: dict[str, tuple[str, int]] = {}

    class Mode(StrEnum):
        INT8_SYM, INT8_ASYM, INT4_SYM, INT4_ASYM = "int8_sym", "int8_asym", "int4_sym", "int4_asym"

    def compress_weights(model: str, mode: str, ignored_scope: Any, **options: Any) -> str:
        if mode.startswith("int8"):
            assert options == {}
        else:
            assert (options["ratio"], options["all_layers"]) == (1.0, True)
        patterns = [re.compile(pattern) for pattern in ignored_scope.patterns]
        for name in [*searched, "model.embed_tokens", "lm_head"]:
            nodes = (f"__module.{name}/aten::linear/MatMul", f"self.{name}.weight")
            if not any(pattern.match(node) for pattern in patterns for node in nodes):
                assert name not in compressed
                compressed[name] = (str(mode), options.get("group_size", -1))
        return model + "+"

    module = types.ModuleType("nncf")
    scope = types.SimpleNamespace
    vars(module).update(
        compress_weights=compress_weights,
        CompressWeightsMode=Mode,
        IgnoredScope=lambda patterns: scope(patterns=patterns),
    )
    monkeypatch.setitem(sys.modules, "nncf", module)
    script: dict[str, Any] = {}
    exec(get_exporter("nncf").text(chosen), script)
    assert script["compress"]("model") == "model++++"
    assert compressed == script["LAYERS"]
    assert "model.layers.11.self_attn.o_proj" not in compressed
    assert compressed["model.layers.1.mlp.down_proj"] == ("int8_sym", -1)
    assert compressed["model.layers.11.mlp.down_proj"] == ("int4_sym", 32)
    assert compressed[f"{BLOCK}.self_attn.k_proj"] == ("int4_asym", -1)


# --- HAWQ ------------------------------------------------------------------------------------

HAWQ = json.loads((Path(__file__).parent / "data" / "hawqv3_resnet18.json").read_text("utf-8"))


def test_bit_config_has_the_modules_of_the_release(tmp_path: Path) -> None:
    """Keys as in bit_config_resnet18_*: quant_convbn1 reads quant_act, quant_convbn2 quant_act1."""
    graph = graph_of(*HAWQ["layers"], shape=(64, 64, 3, 3), kind="conv2d")
    bits = dict.fromkeys(HAWQ["layers"], 8) | {
        "stage1.unit1.convbn2": 4,
        "stage2.unit1.convbn1": 4,
        "stage2.unit1.identity_convbn": 4,
    }
    schemes = {name: parse_scheme(f"int{b}:int{b}") for name, b in bits.items()}
    path = export_allocation("hawq", Chosen(graph=graph, schemes=schemes), tmp_path / "bits.py")
    config = literal(path.read_text(), "bit_config")
    assert config["stage1.unit1.quant_convbn1"] == config["stage1.unit1.quant_act"] == 8
    assert config["stage1.unit1.quant_convbn2"] == config["stage1.unit1.quant_act1"] == 4
    assert config["stage2.unit1.quant_identity_convbn"] == config["stage2.unit1.quant_act"] == 4
    assert import_allocation("hawq", path, graph) == schemes
    path.write_text(path.read_text().replace("{", "{'quant_input': 8, 'quant_act_int32': 16, ", 1))
    assert import_allocation("hawq", path, graph) == schemes


def test_hawq_quantizes_the_input_of_a_block_once() -> None:
    graph = graph_of("u.convbn1", "u.identity_convbn", shape=(8, 8, 3, 3), kind="conv2d")
    chosen = allocated(graph, "int8:int8", identity_convbn="int4:int4")
    with pytest.raises(InvalidInputError, match=r"'u.identity_convbn' is int4:int4.*'u.quant_act'"):
        get_exporter("hawq").text(chosen)
