from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from hw_cost_models import COST_MODELS, get_cost_model
from hw_cost_models.memory import stored_bytes
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_format, parse_scheme
from mpq.core.layers import Convolution, Layer, LayerGraph, Unit, Unsearched
from mpq.core.tables import Cells


def linear(name: str, outputs: int, inputs: int, **changes: object) -> Layer:
    known = {
        "name": name,
        "kind": "linear",
        "weight_shape": (outputs, inputs),
        "weight_id": f"{name}.weight",
        "weight_bytes": 4 * outputs * inputs,
        "input_shape": (1, 7, inputs),
        "output_shape": (1, 7, outputs),
        "macs": 7 * outputs * inputs,
        "calls": 1,
        "order": 0,
    }
    return Layer(**(known | changes))  # type: ignore[arg-type]


def transposed(name: str) -> Layer:
    return Layer(
        name=name,
        kind="conv_transpose2d",
        weight_shape=(6, 5, 3, 3),
        weight_id=f"{name}.weight",
        weight_bytes=6 * 5 * 9 * 4,
        input_shape=(1, 6, 4, 4),
        output_shape=(1, 5, 6, 6),
        macs=6 * 5 * 9 * 16,
        calls=1,
        order=1,
        convolution=Convolution(
            kernel=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1
        ),
    )


def packed_length(values: np.ndarray, bits: int) -> int:
    """Really pack codes into bytes, one bit after the other."""
    stream = ((values.reshape(-1, 1) >> np.arange(bits)) & 1).astype(np.uint8)
    return len(np.packbits(stream.reshape(-1)).tobytes())


def slow_bytes(layer: Layer, text: str) -> int:
    """Quantize nothing, but store every tensor that the format needs, obviously."""
    fmt = parse_format(text)
    if fmt.is_native:
        kept = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}[text]
        return len(np.zeros(layer.weight_shape, kept).tobytes())
    channels = np.moveaxis(np.zeros(layer.weight_shape, np.int64), layer.channel_axis, 0)
    rows = channels.reshape(len(channels), -1)
    if "g" in text:
        rows = rows.reshape(-1, int(text.rstrip("a").split("g")[1]))
    elif "t" in text.removeprefix("int"):
        rows = rows.reshape(1, -1)
    scales = len(np.zeros(len(rows), np.float16).tobytes())
    zero_points = packed_length(np.zeros(len(rows), np.int64), fmt.bits) if "a" in text else 0
    return packed_length(rows, fmt.bits) + scales + zero_points


FORMATS = ["fp32", "fp16", "bf16", "int8", "int7", "int5t", "int3", "int3a", "int1", "int2ta"]


@pytest.mark.parametrize("text", [*FORMATS, "int4g3", "int3g3a", "int5g15a"])
@pytest.mark.parametrize("layer", [linear("odd", 7, 15), transposed("up")], ids=lambda la: la.kind)
def test_bytes_of_a_format_equal_the_really_packed_tensors(layer: Layer, text: str) -> None:
    if "g15" in text and layer.kind != "linear":
        text = "int5g6a"
    assert stored_bytes(layer, parse_format(text)) == slow_bytes(layer, text)


def graph_of_three() -> LayerGraph:
    """Two units: a and its tied twin share one weight; b is alone; a norm stays outside."""
    layers = (
        linear("a", 8, 16),
        linear("twin", 8, 16, weight_id="a.weight", order=1),
        linear("b", 5, 32, order=2, calls=2, macs=2 * 7 * 5 * 32),
        linear("head", 3, 5, order=3),
    )
    return LayerGraph(
        layers=layers,
        units=(Unit(name="ab", layers=("a", "twin")), Unit(name="b", layers=("b",))),
        unsearched=(
            Unsearched(name="norm", elements=9, bytes=36, reason="vector"),
            Unsearched(name="head.weight", elements=15, bytes=60, reason="skipped"),
        ),
        sample="one",
    )


def cells_of(*texts: str) -> Cells:
    schemes = tuple(parse_scheme(text) for text in texts)
    return Cells(units=("ab", "b"), schemes=(schemes, schemes))


def test_memory_counts_tied_weights_once_and_everything_else_as_fixed() -> None:
    graph = graph_of_three()
    table = get_cost_model("memory").table(graph, cells_of("fp32", "int4g8a", "int8:int8"))
    a, b = linear("a", 8, 16), linear("b", 5, 32)
    expected = [slow_bytes(la, t) for la in (a, b) for t in ("fp32", "int4g8a", "int8")]
    np.testing.assert_array_equal(table.values, expected)
    np.testing.assert_array_equal(table.low, table.high)
    assert (table.fixed, table.baseline) == (96, 96 + 4 * (8 * 16 + 5 * 32))
    assert table.weights == 8 * 16 + 5 * 32
    assert (table.name, table.unit) == ("memory", "bytes")


def test_memory_names_the_layer_that_groups_do_not_divide() -> None:
    with pytest.raises(InvalidInputError, match="layer 'a': group size 32") as caught:
        get_cost_model("memory").table(graph_of_three(), cells_of("int4g32"))
    assert caught.value.code == "group_size"


def test_memory_refuses_a_native_format_that_is_wider_than_the_weight() -> None:
    half = linear("half", 4, 4, weight_bytes=32)
    assert stored_bytes(half, parse_format("bf16")) == 32
    with pytest.raises(InvalidInputError, match="'half' holds 16-bit weights: fp32"):
        stored_bytes(half, parse_format("fp32"))


def test_bops_are_macs_times_bits_times_bits() -> None:
    table = get_cost_model("bops").table(
        graph_of_three(), cells_of("fp32", "int4g8", "int8:int8", "bf16")
    )
    macs_ab, macs_b, macs_head = 2 * 7 * 8 * 16, 2 * 7 * 5 * 32, 7 * 3 * 5
    expected = [m * bits for m in (macs_ab, macs_b) for bits in (32 * 32, 4 * 32, 8 * 8, 16 * 32)]
    np.testing.assert_array_equal(table.values, expected)
    assert table.fixed == 1024 * macs_head
    assert table.baseline == 1024 * (macs_ab + macs_b + macs_head)
    assert table.baseline == pytest.approx(
        table.fixed + sum(table[unit, parse_scheme("fp32")] for unit in ("ab", "b"))
    )


def test_bops_of_an_embedding_are_zero() -> None:
    table_of = linear("words", 50, 8, kind="embedding", macs=999)
    graph = LayerGraph(
        layers=(table_of,),
        units=(Unit(name="words", layers=("words",)),),
        unsearched=(),
        sample="one",
    )
    cells = Cells(units=("words",), schemes=((parse_scheme("int8"),),))
    table = get_cost_model("bops").table(graph, cells)
    assert table.values.tolist() == [0.0]
    assert not math.isnan(table.baseline)


def test_every_cost_model_answers_to_its_name() -> None:
    for name in COST_MODELS:
        assert get_cost_model(name).name == name
    with pytest.raises(InvalidInputError, match="did you mean 'memory'"):
        get_cost_model("memroy")


def test_asking_for_a_cost_model_loads_no_runtime() -> None:
    code = (
        "import sys, hw_cost_models as h\n"
        "h.get_cost_model('latency')\n"
        "print(sorted({'onnx', 'onnxruntime', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
