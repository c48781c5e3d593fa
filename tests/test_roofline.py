"""Rooflines: the formula by hand, what it must never do, and complete presets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_cost_models import COST_MODELS, HARDWARE, get_hardware
from hw_cost_models.attention import decode_seconds, prefill_seconds
from hw_cost_models.machines import MACHINES, Machine, get_machine
from hw_cost_models.roofline import Roofline, computes_in, presets
from hw_cost_models.work import bytes_moved, work_of
from mpq.core.attention import Attention
from mpq.core.errors import InvalidInputError
from mpq.core.formats import Format, PerTensor, Scheme, parse_scheme
from mpq.core.layers import Layer
from tests.test_costs import cells_of, graph_of_three, linear

# 100 operations a second in fp32 up to 800 in int8, 10 bytes a second, 3 s a launch.
SLOW = Machine(
    name="slow",
    title="a slow machine",
    peaks={"fp32": 100.0, "fp16": 200.0, "int8": 800.0},
    bandwidth=10.0,
    memory_bytes=1000,
    launch_s=3.0,
    source="made up",
)


def seconds(layer: Layer, text: str, machine: Machine = SLOW) -> float:
    return Roofline(machine=machine).seconds(layer, parse_scheme(text))


@pytest.mark.parametrize(
    ("text", "operations_per_s", "moved"),
    [
        # weights 8 x 16, 7 rows: 112 inputs, 56 outputs; 8 scales of 2 bytes
        ("fp32", 100, 4 * 128 + 4 * (112 + 56)),
        ("fp16", 200, 2 * 128 + 2 * (112 + 56)),
        ("int8", 200, 128 + 16 + 2 * (112 + 56)),  # expanded to fp16
        ("int3", 200, 48 + 16 + 2 * (112 + 56)),
        ("int8:int8", 800, 128 + 16 + 112 + 2 * 56),
        ("int4:int8", 800, 64 + 16 + 112 + 2 * 56),
        ("int4:int4", 800, 64 + 16 + 56 + 2 * 56),  # no int4 arithmetic: in int8
    ],
)
def test_seconds_of_a_layer_by_hand(text: str, operations_per_s: int, moved: int) -> None:
    layer = linear("a", 8, 16)
    computing = 2 * 7 * 8 * 16 / operations_per_s
    assert bytes_moved(layer, parse_scheme(text)) == moved
    assert seconds(layer, text) == pytest.approx(max(computing, moved / 10) + 3)


def test_a_layer_is_bound_by_arithmetic_where_there_are_many_rows() -> None:
    many = linear("a", 8, 16, input_shape=(700, 16), output_shape=(700, 8), macs=700 * 128)
    quick = Machine(**({f: getattr(SLOW, f) for f in SLOW.__slots__} | {"bandwidth": 1e9}))
    assert seconds(many, "fp32", quick) == pytest.approx(2 * 700 * 128 / 100 + 3)


def test_every_call_launches_and_reads_the_weight_again() -> None:
    once, twice = linear("a", 8, 16), linear("a", 8, 16, calls=2, macs=2 * 7 * 128)
    assert seconds(twice, "int8") == pytest.approx(2 * seconds(once, "int8"))
    assert seconds(linear("a", 8, 16, calls=0, macs=0), "int8") == 0


def test_an_embedding_moves_the_rows_it_looks_up() -> None:
    words = linear("w", 50, 8, kind="embedding", input_shape=(1, 5), output_shape=(1, 5, 8), macs=9)
    work = work_of(words)
    assert (work.macs, work.inputs, work.outputs, work.reads) == (0, 0, 40, 0.1)
    assert seconds(words, "fp32") == pytest.approx((0.1 * 50 * 8 * 4 + 40 * 4) / 10 + 3)


def test_experts_read_as_many_as_there_are_tokens_for_them() -> None:
    experts = linear(
        "e", 1, 1, kind="experts", weight_shape=(4, 6, 8), input_shape=(), output_shape=()
    )
    few = Layer(**({f: getattr(experts, f) for f in Layer.__slots__} | {"macs": 2 * 48}))
    many = Layer(**({f: getattr(experts, f) for f in Layer.__slots__} | {"macs": 9 * 48}))
    assert (work_of(few).reads, work_of(few).inputs, work_of(few).outputs) == (0.5, 16, 12)
    assert work_of(many).reads == 1.0


def test_what_a_scheme_is_computed_in() -> None:
    float8 = Format(family="float", bits=8, granularity=PerTensor())
    layer, half = linear("a", 8, 16), linear("b", 8, 16, weight_bytes=256, native_family="bf16")
    h100, t4 = MACHINES["H100"].peaks, MACHINES["T4"].peaks
    assert computes_in(h100, layer, parse_scheme("int3")) == "fp16"
    assert computes_in(h100, half, parse_scheme("int3")) == "bf16"
    assert computes_in(t4, half, parse_scheme("int3")) == "fp16"  # no bf16 there
    assert computes_in(t4, half, parse_scheme("bf16")) == "fp32"
    assert computes_in(t4, half, parse_scheme("int4:int4")) == "int4"
    assert computes_in(h100, half, parse_scheme("int4:int4")) == "int8"  # dropped by Hopper
    assert computes_in(h100, half, Scheme(float8, float8)) == "fp8"
    assert computes_in(t4, half, Scheme(float8, float8)) == "fp16"
    assert computes_in(MACHINES["M3Max"].peaks, half, parse_scheme("int8:int8")) == "bf16"


def test_tf32_is_used_when_asked() -> None:
    wide = linear("a", 512, 512, input_shape=(4096, 512), output_shape=(4096, 512))
    layer = Layer(**({f: getattr(wide, f) for f in Layer.__slots__} | {"macs": 4096 * 512**2}))
    exact, fast = (Roofline(machine="A100", tf32=tf32) for tf32 in (False, True))
    fp32 = parse_scheme("fp32")
    assert fast.seconds(layer, fp32) < exact.seconds(layer, fp32)
    with pytest.raises(InvalidInputError, match="unknown format 'tf32'"):
        Roofline(machine="T4", tf32=True)


def test_a_table_sums_units_and_counts_what_is_outside_as_it_is() -> None:
    graph, model = graph_of_three(), Roofline(machine=SLOW)
    table = model.table(graph, cells_of("fp32", "int8:int8"))
    layers = graph.by_name
    for unit, names in {"ab": ("a", "twin"), "b": ("b",)}.items():
        for text in ("fp32", "int8:int8"):
            expected = sum(seconds(layers[name], text) for name in names)
            assert table[unit, parse_scheme(text)] == pytest.approx(expected)
    assert table.fixed == pytest.approx(seconds(layers["head"], "fp32"))
    native = sum(seconds(layer, "fp32") for layer in graph.layers)
    assert table.baseline == pytest.approx(native)
    assert (table.name, table.unit, table.provenance) == ("latency", "s", "roofline slow")


@given(
    bits=st.integers(1, 7),
    rows=st.integers(1, 4096),
    machine=st.sampled_from(sorted(MACHINES)),
    activations=st.sampled_from(["", ":int8"]),
)
def test_narrower_weights_are_never_slower(
    bits: int, rows: int, machine: str, activations: str
) -> None:
    layer = linear(
        "a", 64, 128, input_shape=(rows, 128), output_shape=(rows, 64), macs=rows * 64 * 128
    )
    narrow, wide = (
        seconds(layer, f"int{b}{activations}", MACHINES[machine]) for b in (bits, bits + 1)
    )
    assert narrow <= wide


@given(
    rows=st.integers(1, 4096),
    factor=st.floats(1, 100),
    text=st.sampled_from(["fp32", "int4", "int8:int8"]),
)
def test_a_faster_machine_and_fewer_rows_are_never_slower(
    rows: int, factor: float, text: str
) -> None:
    values = {f: getattr(SLOW, f) for f in SLOW.__slots__}
    faster = Machine(
        **values
        | {
            "peaks": {name: factor * peak for name, peak in SLOW.peaks.items()},
            "bandwidth": factor * SLOW.bandwidth,
        }
    )

    def of(rows: int, machine: Machine) -> float:
        layer = linear("a", 8, 16, input_shape=(rows, 16), output_shape=(rows, 8), macs=rows * 128)
        return seconds(layer, text, machine)

    assert of(rows, faster) <= of(rows, SLOW) <= of(rows + 1, SLOW)


@pytest.mark.parametrize("name", MACHINES)
def test_a_preset_is_complete(name: str) -> None:
    machine = get_machine(name)
    assert machine.name == name
    assert {"fp32", "fp16"} <= machine.peaks.keys()
    assert machine.peaks.keys() <= {"fp32", "tf32", "bf16", "fp16", "fp8", "int8", "int4"}
    assert all(1e9 < peak < 1e16 for peak in machine.peaks.values())
    order = [machine.peaks[f] for f in ("fp32", "fp16", "int8", "int4") if f in machine.peaks]
    assert order == sorted(order)
    assert 1e9 < machine.bandwidth < 1e13
    assert machine.memory_bytes >= 8e9
    assert 0 < machine.launch_s < 1e-4
    assert machine.source
    assert machine.title
    model = get_hardware(f"roofline:{name}")
    assert model.name == "latency"
    assert model.provenance == f"roofline {name}"


def test_one_token_of_a_70b_layer_on_an_h100_by_hand() -> None:
    """down_proj of Llama 3 70B, batch 1: weights of 8192 x 28672 are what takes the time."""
    layer = linear(
        "down",
        8192,
        28672,
        weight_bytes=2 * 8192 * 28672,
        native_family="bf16",
        input_shape=(1, 1, 28672),
        output_shape=(1, 1, 8192),
        macs=8192 * 28672,
    )
    model = Roofline(machine="H100")
    moved = 8192 * 28672 * (4 + 16 / 128) / 8 + 2 * (28672 + 8192)
    found = model.seconds(layer, parse_scheme("int4g128"))
    assert found == pytest.approx(moved / 3.35e12 + 3e-6, rel=1e-12)


def test_hardware_that_is_not_known_is_one_line_with_the_nearest() -> None:
    for text, near in {
        "roofline:H10": "did you mean 'H100'",
        "H100": "Known: .*roofline:H100",
        "rofline:A100": "did you mean 'roofline:A100'",
        "roofline": "unknown hardware 'roofline'",
        "roofline:": "unknown hardware 'roofline:'",
        "": "unknown hardware ''",
    }.items():
        with pytest.raises(InvalidInputError, match=near) as caught:
            get_hardware(text)
        assert "\n" not in str(caught.value)
        assert "H100" in str(caught.value)
    assert all(text.removeprefix("roofline:") in MACHINES for text in presets())


def test_a_latency_model_has_the_name_that_budgets_use() -> None:
    texts = {"roofline": "roofline:L4", "bitplanes": "bitplanes:a=0,c=1e-15"}
    assert texts.keys() | {"table"} == HARDWARE.keys()
    assert all(get_hardware(text).name in COST_MODELS for text in texts.values())


def test_schemes_offered_can_be_stored_and_timed() -> None:
    model = Roofline(machine="Orin")
    odd = linear("odd", 7, 15)
    half = linear("half", 64, 128, weight_bytes=2 * 64 * 128, native_family="bf16")
    assert [str(s) for s in model.schemes(odd)] == ["fp32", "int8:int8", "int8", "int4", "int3"]
    assert [str(s) for s in model.schemes(half)] == [
        "bf16",
        "int8:int8",
        "int8",
        "int4g128",
        "int3g128",
        "int2g32a",
    ]
    words = linear("w", 50, 32, kind="embedding", input_shape=(1, 5), output_shape=(1, 5, 32))
    assert "reads indices" in model.why_not(words, parse_scheme("int8:int8"))
    assert "floating-point weights" in model.why_not(odd, parse_scheme("fp32:int8"))


# --- attention -----------------------------------------------------------------------------

LLAMA = Attention(heads=64, kv_heads=8, head_dim=128, windows=(None,) * 80)


def test_kv_cache_of_llama_3_70b_by_hand() -> None:
    # 2 * 80 layers * 8 heads * 128 * 2 bytes = 327,680 bytes a token
    assert LLAMA.cache_bytes(1, 1, 2) == 327_680
    assert LLAMA.cache_bytes(8192, 4, 2) == 327_680 * 8192 * 4


@pytest.mark.parametrize("window", [None, 1, 5, 20])
def test_products_of_attention_count_pairs_within_the_window(window: int | None) -> None:
    attention = Attention(heads=3, kv_heads=1, head_dim=4, windows=(window, None))
    pairs = sum(
        1
        for reach in attention.windows
        for query in range(20)
        for key in range(query + 1)
        if query - key < (reach or 20)
    )
    assert attention.prefill_macs(20, 2) == 2 * 3 * 4 * pairs * 2
    assert attention.cached(20) == min(20, window or 20) + 20
    assert attention.decode_macs(20, 2) == 2 * 3 * 4 * attention.cached(20) * 2


def test_seconds_of_attention_by_hand() -> None:
    machine = MACHINES["H100"]
    cache = LLAMA.cache_bytes(2048, 1, 2) + 2 * 64 * 128 * 80 * 2
    expected = cache / 3.35e12 + 80 * 3e-6
    assert decode_seconds(machine, LLAMA, "bf16", 2048, 1) == pytest.approx(expected)
    macs = 2 * 64 * 128 * 80 * (8192 * 8193 // 2)
    expected = 2 * macs / 989.4e12 + 80 * 3e-6
    assert prefill_seconds(machine, LLAMA, "bf16", 8192, 1) == pytest.approx(expected)


def test_a_longer_context_never_takes_less() -> None:
    machine = MACHINES["RaspberryPi5"]
    small = Attention(heads=4, kv_heads=2, head_dim=8, windows=(None, 16))
    for seconds_of in (prefill_seconds, decode_seconds):
        times = [seconds_of(machine, small, "fp16", n, 1) for n in range(1, 64)]
        assert (np.diff(times) >= 0).all()
        assert all(math.isfinite(t) for t in times)
