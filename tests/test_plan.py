"""Plans: the bytes of a real network, times by hand, a network of 70 G parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mpq
from hw_cost_models.attention import decode_seconds
from hw_cost_models.machines import MACHINES
from hw_cost_models.roofline import Roofline
from mpq.cli import main
from mpq.core.attention import Attention
from mpq.core.errors import InfeasibleError, InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.export.packed import write_packed
from mpq.models import load_shapes
from mpq.nn.graph import build_graph
from mpq.nn.quantizers import WeightQuantizer
from mpq.nn.shapes import attention_of, token_sample
from tests.builders import Decoder, conv_net, mlp

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SCHEMES = ["fp32", "int8", "int4g32", "int3g32"]


def small_config() -> Any:
    return transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **SMALL)


def not_a_network() -> int:
    return 3


@pytest.fixture
def directory(tmp_path: Path) -> str:
    small_config().save_pretrained(tmp_path)
    return str(tmp_path)


def real() -> nn.Module:
    model: nn.Module = transformers.LlamaForCausalLM(small_config())
    return model.eval()


def plan(directory: Any, **options: Any) -> mpq.Plan:
    return mpq.plan(directory, **({"tokens": 16, "schemes": SCHEMES} | options))


def test_the_meta_device_shows_the_same_layers_as_the_real_network(directory: str) -> None:
    shapes = load_shapes(directory)
    assert all(p.is_meta for p in shapes.parameters())
    traced = build_graph(shapes, token_sample(shapes, 2, 16))
    assert traced == build_graph(real(), token_sample(real(), 2, 16))


def test_bytes_are_those_of_the_real_network_written_to_a_file(
    directory: str, tmp_path: Path
) -> None:
    found, model = plan(directory, bits=4.7), real()
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert found.native_bytes == stored == found.uniform[0].weight_bytes
    assert found.parameters == sum(p.numel() for p in model.parameters())
    graph = build_graph(model, token_sample(model, 1, 16))
    packed = write_packed(
        tmp_path / "packed.safetensors", model, graph, found.allocation, WeightQuantizer()
    )
    assert packed.tensor_bytes == found.chosen.weight_bytes
    assert "units int8" in found.chosen.name


def test_seconds_are_the_sums_of_the_roofline_and_of_attention(directory: str) -> None:
    found = plan(directory, hardware="roofline:T4", batch=2, context=40)
    model, roofline = real(), Roofline(machine="T4")
    graph = build_graph(model, token_sample(model, 2, 1))
    for row in found.uniform:
        layers = sum(
            roofline.seconds(layer, parse_scheme("fp32" if layer.kind == "embedding" else row.name))
            for layer in graph.layers
        )
        attention = Attention(heads=4, kv_heads=2, head_dim=16, windows=(None,) * 3)
        expected = layers + decode_seconds(MACHINES["T4"], attention, "fp32", 40, 2)
        assert row.seconds["decode"] == pytest.approx(expected, rel=1e-9)
    assert found.kv_cache_bytes == 2 * 2 * 16 * 3 * 40 * 2 * 4
    assert all(r.resident_bytes - r.weight_bytes == found.kv_cache_bytes for r in found.uniform)


def test_mean_bits_are_kept_and_small_units_are_wider(directory: str) -> None:
    network = load_shapes(directory)
    graph = build_graph(network, token_sample(network, 1, 1))
    sizes = {
        unit.name: sum(la.num_weights for la in graph.stored_layers(unit)) for unit in graph.units
    }
    for bits in (3.6, 4.0, 4.5, 5.0, 6.3, 8.9, 20.0, 32.0):
        found = plan(network, bits=bits)
        assert found.chosen.bits <= bits
        assert found.allocation
        widths = {unit: scheme.weights.bits for unit, scheme in found.allocation.items()}
        assert len(set(widths.values())) <= 2
        if len(set(widths.values())) == 2:
            assert any("unscored" in note for note in found.notes)
            wide = {unit for unit, width in widths.items() if width == max(widths.values())}
            assert max(sizes[u] for u in wide) <= min(sizes[u] for u in sizes.keys() - wide)
    exact = next(row for row in found.uniform if row.name == "int4g32")
    again = plan(directory, bits=exact.bits)
    assert again.chosen.name == "int4g32"
    assert set(map(str, again.allocation.values())) == {"int4g32"}


def test_more_bits_take_more_bytes_and_a_larger_context_more_memory(directory: str) -> None:
    network = load_shapes(directory)
    sizes = [plan(network, bits=b).chosen.weight_bytes for b in (3.6, 4.0, 4.4, 5, 6, 7, 8, 9)]
    assert sizes == sorted(sizes)
    contexts = [plan(network, context=n) for n in (16, 32, 64)]
    assert [p.kv_cache_bytes for p in contexts] == sorted({p.kv_cache_bytes for p in contexts})
    decode = [p.chosen.seconds["decode"] for p in contexts]
    assert decode == sorted(decode)


def test_what_fits_is_told_for_the_memory_asked_for(directory: str) -> None:
    sizes = {row.name: row.resident_bytes for row in plan(directory).uniform}
    found = plan(directory, memory=f"{sizes['int8']} B")
    fits = {row.name: row.fits for row in found.uniform}
    assert fits == {"fp32": False, "int8": True, "int4g32": True, "int3g32": True}
    assert found.memory_bytes == sizes["int8"]
    assert all(row.fits for row in plan(directory).uniform)


def test_any_network_is_planned_with_a_sample() -> None:
    found = mpq.plan(conv_net(), sample=torch.randn(2, 3, 16, 16), bits=9, schemes=["int8"])
    assert found.chosen.seconds.keys() == {"forward"}
    assert found.kv_cache_bytes == 0
    with torch.device("meta"):
        network, sample = mlp(), torch.zeros(2, 6)
    assert mpq.plan(network, sample=sample, bits=12).units == 2


def test_a_network_that_generates_nothing_has_no_cache(tmp_path: Path) -> None:
    found = mpq.plan(Decoder(), bits=12, tokens=4)
    assert found.chosen.seconds.keys() == {"forward"}
    assert any("attention between tokens" in note for note in found.notes)
    encoder = transformers.BertConfig(
        architectures=["BertModel"],
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    encoder.save_pretrained(tmp_path)
    assert mpq.plan(str(tmp_path), tokens=8).chosen.seconds.keys() == {"forward"}


def test_experts_on_the_meta_device_are_those_of_the_real_network(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        architectures=["MixtralForCausalLM"], num_local_experts=4, dtype="bfloat16", **SMALL
    )
    config.save_pretrained(tmp_path)
    shapes = load_shapes(str(tmp_path))
    model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    traced, known = (build_graph(net.eval(), token_sample(net, 2, 16)) for net in (shapes, model))
    assert [la for la in traced.layers if la.kind == "experts"]
    assert traced == known


def test_defaults_are_what_every_layer_can_store(directory: str) -> None:
    found = mpq.plan(directory, tokens=8)
    names = [row.name for row in found.uniform]
    assert names[:3] == ["fp32", "int8", "int8:int8"]
    assert "int4g64" in names  # 64 divides every row, 128 does not
    assert all(row.bits > 0 for row in found.uniform)


def test_sliding_windows_and_other_attention_are_read_from_the_config() -> None:
    class Network(nn.Module):
        def __init__(self, **config: Any) -> None:
            super().__init__()
            self.config = transformers.PretrainedConfig(
                num_hidden_layers=2, num_attention_heads=4, hidden_size=32, **config
            )

    attention, notes = attention_of(
        Network(layer_types=["sliding_attention", "full_attention"], sliding_window=8, head_dim=16),
        100,
    )
    assert attention == Attention(heads=4, kv_heads=4, head_dim=16, windows=(8, None))
    assert notes == []
    attention, notes = attention_of(Network(layer_types=["linear_attention", "full_attention"]), 9)
    assert attention is not None
    assert len(attention.windows) == 1
    assert "linear_attention" in notes[0]
    attention, notes = attention_of(Network(kv_lora_rank=4), 9)
    assert attention is None
    assert "latent attention" in notes[0]
    _, notes = attention_of(Network(max_position_embeddings=64), 65)
    assert "beyond the 64 positions" in notes[0]


def test_bad_input_is_one_line(directory: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "lama"}')
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (InvalidInputError, "did you mean 'H100'", {"hardware": "roofline:H10"}),
        (InvalidInputError, "a machine with a memory", {"hardware": "local"}),
        (InvalidInputError, "a machine with a memory", {"hardware": "bitplanes:a=0,c=1"}),
        (InvalidInputError, "batch is a whole number", {"batch": 0}),
        (InvalidInputError, "tokens is a whole number", {"tokens": 1.5}),
        (InvalidInputError, "context is a whole number", {"context": -1}),
        (InvalidInputError, "positive finite", {"bits": 0.0}),
        (InvalidInputError, "positive finite", {"bits": float("nan")}),
        (InvalidInputError, "group size 128 does not divide", {"schemes": ["int4g128"]}),
        (InvalidInputError, "did you mean 'int4'", {"schemes": ["itn4"]}),
        (InvalidInputError, "skip", {"skip": ["nothing*"]}),
        (InvalidInputError, "budget unit", {"memory": "48 GX"}),
        (InvalidInputError, "has no config.json", {"model": str(tmp_path / "empty")}),
        (InvalidInputError, "cannot load", {"model": str(tmp_path / "broken")}),
        (InvalidInputError, "not a config", {"model": "tests.test_plan:not_a_network"}),
        (InvalidInputError, "takes no input_ids", {"model": mlp()}),
        (InfeasibleError, "no scheme takes so few bits: the narrowest, int3g32", {"bits": 2.0}),
    ]
    for error, says, given in cases:
        given = dict(given)
        with pytest.raises(error) as caught:
            plan(given.pop("model", directory), **given)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_command_prints_tables_and_json(
    directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["mpq", "plan", directory, "--bits", "4.5", "--seq", "16", "--schemes"]

    def printed(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    table = printed("fp32,int8,int4g32", "--hardware", "roofline:RaspberryPi5")
    assert "prefill (modelled)" in table
    assert "decode (modelled)" in table
    assert "Raspberry Pi 5" in table
    shown = json.loads(printed("fp32,int8,int4g32", "--json"))
    assert shown["hardware"] == "roofline H100"
    assert [row["name"] for row in shown["uniform"]] == ["fp32", "int8", "int4g32"]
    assert shown["chosen"]["bits"] <= 4.5
    assert all(row["modelled"] for row in shown["uniform"])
    assert set(shown["allocation"].values()) == {"int4g32"}


SEVENTY = """
import json, pathlib, time
start = time.process_time()
import mpq
found = mpq.plan("examples.llama3_70b:make_config", bits=4.0, tokens=8192, batch=4)
status = pathlib.Path("/proc/self/status").read_text()  # its own: rusage has the parent's too
print(json.dumps({
    "seconds": time.process_time() - start,
    "peak_bytes": 1024 * int(status.partition("VmHWM:")[2].split()[0]),
    "parameters": found.parameters,
    "layers": found.layers,
    "bytes": [row.weight_bytes for row in found.uniform],
    "names": [row.name for row in found.uniform],
    "cache": found.kv_cache_bytes,
    "bits": found.chosen.bits,
    "decode": {row.name: row.seconds["decode"] for row in found.uniform},
    "prefill": {row.name: row.seconds["prefill"] for row in found.uniform},
}))
"""


@pytest.mark.slow
def test_seventy_billion_parameters_are_planned_in_seconds() -> None:
    root = Path(mpq.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", SEVENTY], capture_output=True, text=True, check=True, cwd=root
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seconds"] < 20
    assert found["peak_bytes"] < 2e9
    assert found["parameters"] == 70_553_706_496
    assert found["layers"] == 80 * 7 + 2
    assert found["bytes"][0] == 2 * 70_553_706_496
    # every linear weight at 4 bits and 16 bits of scale for 128; the rest stays bf16
    embedding, norms = 128256 * 8192, (2 * 80 + 1) * 8192
    linears = 70_553_706_496 - embedding - norms
    at_four = found["bytes"][found["names"].index("int4g128")]
    assert at_four == linears * (4 + 16 / 128) / 8 + 2 * (embedding + norms)
    assert found["cache"] == 2 * 80 * 8 * 128 * 8192 * 4 * 2
    assert 3.99 < found["bits"] <= 4.0
    # decoding reads every weight and the cache once
    read = linears * 2 + found["cache"]
    assert found["decode"]["bf16"] == pytest.approx(read / 3.35e12, rel=0.05)
    # a prompt multiplies: 2 operations a weight and token, and attention
    operations = 2 * (linears - embedding) * 4 * 8192
    assert found["prefill"]["bf16"] == pytest.approx(operations / 989.4e12, rel=0.1)
    assert found["prefill"]["int8:int8"] < found["prefill"]["bf16"]


def test_a_plan_of_profiles_has_the_phases_of_plans_of_their_shapes(directory: str) -> None:
    profiles = {
        "prompt": mpq.Profile(tokens=32),
        "next": mpq.Profile(tokens=1, batch=4, weight=9.0),
    }
    found = mpq.plan(directory, tokens=8, context=16, schemes=SCHEMES, profiles=profiles)
    prompt = mpq.plan(directory, tokens=32, context=16, schemes=SCHEMES)
    following = mpq.plan(directory, batch=4, tokens=8, context=16, schemes=SCHEMES)
    for row, one, other in zip(found.uniform, prompt.uniform, following.uniform, strict=True):
        assert row.seconds["prompt"] == one.seconds["prefill"]
        assert row.seconds["next"] == other.seconds["decode"]
        mean = (row.seconds["prompt"] + 9 * row.seconds["next"]) / 10
        assert row.seconds["latency"] == pytest.approx(mean)
    assert found.kv_cache_bytes == following.kv_cache_bytes


def test_what_breaks_a_budget_of_a_phase_does_not_fit(
    directory: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"schemes": SCHEMES, "hardware": "roofline:RaspberryPi5"}
    plain = mpq.plan(directory, tokens=32, **options)
    seconds = [row.seconds["decode"] for row in plain.uniform]
    limit = sorted(seconds)[1] * 1e3
    budgets = [f"decode <= {limit!r} ms", "prefill <= 100%", "memory <= 100%"]
    found = mpq.plan(directory, tokens=32, budgets=budgets, **options)
    expected = [row.seconds["decode"] <= limit * 1e-3 for row in plain.uniform]
    assert [row.fits for row in found.uniform] == expected
    assert sum(expected) == 2
    monkeypatch.setattr(sys, "argv", ["mpq", "plan", directory, "--budget", "prefil <= 1 ms"])
    with pytest.raises(SystemExit):
        main()
    assert "unknown cost 'prefil': did you mean 'prefill'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"profiles": {"a": mpq.Profile(sample={})}},
            "profile 'a': in a plan it has batch and tok",
        ),
        ({"profiles": {"memory": mpq.Profile()}}, "cannot have the name of a cost, 'memory'"),
        ({"budgets": "decode <= 1 ms"}, "budgets is a list, got 'decode <= 1 ms': write"),
        ({"budgets": ["decode <= 1 MB"]}, "decode is counted in s"),
    ],
)
def test_profiles_and_budgets_of_a_plan_are_checked(
    directory: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidInputError, match=says):
        mpq.plan(directory, tokens=8, schemes=SCHEMES, **options)


def test_profiles_of_a_network_of_something_else_are_of_its_sample() -> None:
    sample = torch.randn(2, 3, 8, 8)
    profiles = {"one": mpq.Profile(batch=1), "many": mpq.Profile(batch=5)}
    found = mpq.plan(conv_net(), sample=sample, bits=9, profiles=profiles, schemes=["int8"])
    one = mpq.plan(conv_net(), sample=sample[:1], bits=9, schemes=["int8"])
    assert found.chosen.seconds["one"] == one.chosen.seconds["forward"]
    assert found.chosen.seconds["many"] > found.chosen.seconds["one"]
