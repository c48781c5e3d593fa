from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from mpq.core.errors import InvalidInputError
from mpq.core.layers import LayerGraph
from mpq.nn.graph import build_graph
from tests.builders import (
    CASES,
    Block,
    Decoder,
    Experts,
    Recurrent,
    Shuffled,
    case,
    conv_net,
    mlp,
    tokens,
)
from tests.oracles import hooked_macs, stored_tensors, traced_macs

X = torch.randn(4, 6)


def members(graph: LayerGraph) -> list[tuple[str, ...]]:
    return [unit.layers for unit in graph.units]


def reasons(graph: LayerGraph) -> dict[str, str]:
    return {part.name: part.reason for part in graph.unsearched}


GEOMETRIES = [
    (nn.Linear(6, 8), (4, 6)),
    (nn.Linear(6, 8, bias=False), (2, 3, 5, 6)),
    (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (2, 4, 11)),
    (nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0)), (2, 4, 9, 7)),
    (nn.Conv2d(4, 4, 3, groups=4, padding="same", dilation=2), (1, 4, 8, 8)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 6)),
    (nn.ConvTranspose2d(4, 6, (2, 3), groups=2, padding=1, dilation=2), (2, 4, 5, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), GEOMETRIES, ids=lambda v: str(v)[:60])
def test_macs_by_shape_equal_the_counted_operations(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    sample = torch.randn(shape)
    found = build_graph(nn.Sequential(layer), sample).by_name["0"]
    assert found.macs == traced_macs(layer, sample)
    assert (found.input_shape, found.output_shape) == (shape, tuple(layer(sample).shape))


@pytest.mark.parametrize("name", CASES)
def test_macs_of_whole_networks_equal_the_counted_operations(name: str) -> None:
    model, sample = case(name)
    graph = build_graph(model, sample)
    assert {layer.name: layer.macs for layer in graph.layers} == hooked_macs(model, sample)


def test_a_convolution_keeps_its_geometry() -> None:
    layer = nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0), groups=2)
    found = build_graph(nn.Sequential(layer), torch.randn(1, 4, 9, 7)).layers[0].convolution
    assert found is not None
    assert (found.kernel, found.stride, found.padding) == ((3, 1), (2, 1), (1, 0))
    assert (found.dilation, found.groups, found.output_padding) == ((1, 1), 2, (0, 0))


def test_padding_given_by_name_is_told_in_numbers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, (3, 5), padding="same"), nn.Conv2d(3, 3, 3, padding="valid")
    )
    graph = build_graph(model, torch.randn(1, 3, 8, 8))
    assert [la.convolution.padding for la in graph.layers if la.convolution] == [(1, 2), (0, 0)]


@pytest.mark.parametrize("times", [1, 2, 5])
def test_calls_of_a_shared_module_are_counted(times: int) -> None:
    found = build_graph(Recurrent(times=times), torch.randn(3, 4)).by_name["cell"]
    assert (found.calls, found.macs) == (times, times * 3 * 4 * 4)


def test_layers_are_in_execution_order_and_those_never_called_come_last() -> None:
    graph = build_graph(Shuffled(), X)
    assert [(la.name, la.order) for la in graph.layers] == [
        ("first", 0),
        ("last", 1),
        ("never", -1),
    ]
    assert members(graph) == [("first",), ("last",)]


def test_a_module_never_called_is_reported() -> None:
    graph = build_graph(Shuffled(), X)
    assert reasons(graph)["never.weight"] == "not called on the sample"
    assert (graph.by_name["never"].macs, graph.by_name["never"].calls) == (0, 0)


def test_projections_of_one_tensor_are_fused() -> None:
    graph = build_graph(Block(), torch.randn(2, 5, 8))
    assert [(unit.name, unit.reason) for unit in graph.units] == [
        ("{q_proj,k_proj,v_proj}", "fused q/k/v"),
        ("o_proj", "single layer"),
        ("{gate_proj,up_proj}", "fused gate/up"),
        ("down_proj", "single layer"),
    ]


def test_cross_attention_fuses_only_what_reads_the_same_tensor() -> None:
    graph = build_graph(Block(cross=True), torch.randn(2, 5, 8))
    assert members(graph)[:2] == [("q_proj",), ("k_proj", "v_proj")]


def test_a_fused_unit_is_named_after_its_parent() -> None:
    graph = build_graph(Decoder(), tokens())
    assert graph.units[0].name == "blocks.0.{q_proj,k_proj,v_proj}"


@pytest.mark.parametrize(
    "leaves", [("query", "key", "value"), ("to_q", "to_k", "to_v"), ("wi_0", "wi_1"), ("w1", "w3")]
)
def test_projections_are_known_by_the_usual_names(leaves: tuple[str, ...]) -> None:
    model = nn.ModuleDict({leaf: nn.Linear(6, 6) for leaf in leaves})
    model.forward = lambda x: sum(model[leaf](x) for leaf in leaves)  # type: ignore[method-assign]
    assert members(build_graph(model, X)) == [leaves]


def test_none_fuses_nothing() -> None:
    graph = build_graph(Block(), torch.randn(2, 5, 8), groups="none")
    assert all(len(unit.layers) == 1 for unit in graph.units)
    assert len(graph.units) == 7


def test_tied_weights_are_one_unit_even_without_groups() -> None:
    graph = build_graph(Recurrent(), torch.randn(3, 4), groups="none")
    unit = graph.units[0]
    assert (unit.layers, unit.reason) == (("cell", "twin"), "tied weights")
    assert [layer.name for layer in graph.stored_layers(unit)] == ["cell"]
    assert graph.searched_weights == 16 + 8


def test_groups_of_the_user_are_added() -> None:
    graph = build_graph(
        Block(), torch.randn(2, 5, 8), groups=[["o_proj", "down*"], ["q_proj", "o_proj"]]
    )
    assert members(graph) == [
        ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),
        ("gate_proj", "up_proj"),
    ]
    assert graph.units[0].reason == "fused q/k/v, group given by the user"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("some", "groups is 'auto', 'none' or lists, got 'some'"),
        (["q_proj", "k_proj"], "list of lists of layer names, got 'q_proj'"),
        ([["q_porj"]], "groups pattern 'q_porj' matches no layer: did you mean 'q_proj'"),
    ],
)
def test_malformed_groups_are_refused(groups: Sequence, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        build_graph(Block(), torch.randn(2, 5, 8), groups=groups)


@pytest.mark.parametrize("name", ["a.b", "layer one", "größe", "层", "q-proj", "x" * 500])
def test_any_layer_name_can_be_skipped(name: str) -> None:
    model = mlp()
    owner, _, leaf = name.rpartition(".")
    if owner:
        model.add_module(owner, nn.Module())
    parent = model.get_submodule(owner)
    parent.add_module(leaf, nn.Linear(3, 3))
    model.forward = lambda x: parent.get_submodule(leaf)(model[2](model[0](x)))  # type: ignore
    graph = build_graph(model, X, skip=[name])
    assert name in graph.by_name
    assert members(graph) == [("0",), ("2",)]
    assert reasons(graph)[f"{name}.weight"] == f"skipped as asked ({name})"


def test_skip_takes_shell_patterns() -> None:
    graph = build_graph(Decoder(), tokens(), skip=["blocks.1.*", "*.o_proj"])
    assert members(graph) == [
        ("blocks.0.q_proj", "blocks.0.k_proj", "blocks.0.v_proj"),
        ("blocks.0.gate_proj", "blocks.0.up_proj"),
        ("blocks.0.down_proj",),
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blocks.9.*", "skip pattern 'blocks.9.*' matches no layer"),
        ("lm_haed", "did you mean 'lm_head'"),
        ("", "a text of 1 to 500 characters"),
        ("*" * 501, "a text of 1 to 500 characters"),
    ],
)
def test_a_skip_pattern_that_matches_nothing_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        build_graph(Decoder(), tokens(), skip=[pattern])
    assert message in str(caught.value)


def test_skipping_everything_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="every layer is left out: skipped as asked"):
        build_graph(mlp(), X, skip=["*"])


def test_an_embedding_is_listed_but_not_searched() -> None:
    graph = build_graph(Decoder(tied=False), tokens())
    assert graph.by_name["embed"].kind == "embedding"
    assert ("lm_head",) in members(graph)
    assert reasons(graph)["embed.weight"].startswith("embeddings are searched only when asked")


def test_an_embedding_is_searched_when_asked() -> None:
    graph = build_graph(Decoder(tied=False), tokens(), embeddings=True)
    assert ("embed",) in members(graph)


def test_a_head_tied_to_an_embedding_stays_outside_with_it() -> None:
    graph = build_graph(Decoder(), tokens())
    assert not any({"lm_head", "embed"} & set(layers) for layers in members(graph))
    assert graph.by_name["lm_head"].weight_id == "embed.weight"
    assert sum(part.name == "embed.weight" for part in graph.unsearched) == 1


def test_a_head_tied_to_an_embedding_is_one_unit_with_it_when_asked() -> None:
    graph = build_graph(Decoder(), tokens(), embeddings=True)
    assert graph.units[0].layers == ("embed", "lm_head")
    assert len(graph.stored_layers(graph.units[0])) == 1


def test_a_3d_parameter_that_no_matrix_product_reads_is_reported() -> None:
    model = Experts()
    model.shift = nn.Parameter(torch.zeros(4, 1, 6))
    model.forward = lambda x: model.router((x[:, None] + model.shift)[:, 0])  # type: ignore
    graph = build_graph(model, X)
    found = {part.name: part for part in graph.unsearched if part.name in ("experts", "shift")}
    assert {part.reason for part in found.values()} == {
        "3-d parameter of Experts: no stack of matrices that a product reads"
    }
    assert (found["experts"].elements, found["experts"].bytes) == (72, 288)


def test_layers_without_weights_are_listed() -> None:
    graph = build_graph(Experts(), X)
    assert {"empty", "narrow"} <= set(graph.by_name)
    assert reasons(graph)["empty.weight"] == reasons(graph)["narrow.weight"] == "it has no weights"
    assert members(graph) == [("router",), ("experts",)]


def parts_of(graph: LayerGraph) -> dict[str, int]:
    searched = {
        layer.weight_id: layer.weight_bytes
        for unit in graph.units
        for layer in graph.stored_layers(unit)
    }
    outside = {part.name: part.bytes for part in graph.unsearched}
    assert not searched.keys() & outside.keys()
    return searched | outside


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_stored_tensor_is_accounted_for_once(name: str, embeddings: bool) -> None:
    model, sample = case(name)
    graph = build_graph(model, sample, embeddings=embeddings)
    assert parts_of(graph) == stored_tensors(model)
    assert graph.native_bytes == sum(stored_tensors(model).values())


def test_stored_tensors_of_unusual_modules_are_accounted_for_once() -> None:
    for model in (Experts(), Shuffled()):
        assert parts_of(build_graph(model, X)) == stored_tensors(model)


@pytest.mark.parametrize("skip", [["0"], ["0", "3"]])
def test_coverage_is_the_searched_share_of_all_elements(skip: list[str]) -> None:
    model, sample = case("conv")
    graph = build_graph(model, sample, skip=skip)
    searched = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if hasattr(module, "weight") and module.weight.ndim > 1 and name not in skip
    )
    everything = sum(tensor.numel() for tensor in model.state_dict().values())
    assert graph.coverage == pytest.approx(searched / everything)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_layer_count_and_place(bad: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 3] = model[2].weight[2, 0] = bad
    with pytest.raises(
        InvalidInputError, match=r"layer '2' has 2 .*the first at \[1, 3\]"
    ) as caught:
        build_graph(model, X)
    assert caught.value.code == "weights_not_finite"


def test_weights_that_are_not_finite_may_be_skipped() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 3] = float("nan")
    assert members(build_graph(model, X, skip=["2"])) == [("0",)]


def test_a_model_without_a_quantizable_layer_lists_its_types() -> None:
    model = nn.Sequential(nn.ReLU(), nn.LayerNorm(6))
    with pytest.raises(InvalidInputError, match="LayerNorm, ReLU, Sequential") as caught:
        build_graph(model, X)
    assert caught.value.code == "nothing_to_quantize"


def with_config(config: object) -> nn.Module:
    model = mlp()
    model.config = type("Config", (), {"quantization_config": config})()
    return model


def with_integers() -> nn.Module:
    model = mlp()
    model[0].weight = nn.Parameter(torch.ones(8, 6, dtype=torch.int8), requires_grad=False)
    return model


def with_packed_module() -> nn.Module:
    packed = type("Linear", (nn.Module,), {"__module__": "torch.ao.nn.quantized.modules.linear"})
    return nn.Sequential(nn.Linear(6, 6), packed())


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (with_config({"quant_method": "gptq", "bits": 4}), "quantization_config gptq"),
        (with_integers(), "'0.weight'"),
        (with_packed_module(), "'1'"),
    ],
)
def test_an_already_quantized_model_is_refused(model: nn.Module, found: str) -> None:
    with pytest.raises(InvalidInputError, match=f"already quantized \\({found}\\)") as caught:
        build_graph(model, X)
    assert caught.value.code == "already_quantized"


def test_dropout_is_off_and_modes_come_back() -> None:
    model = conv_net().train()
    model[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    buffers = [buffer.clone() for buffer in model.buffers()]
    build_graph(model, torch.randn(2, 3, 8, 8))  # with dropout on, this would warn
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(map(torch.equal, model.buffers(), buffers))
    assert not any(module._forward_hooks for module in model.modules())


class Noisy(nn.Module):
    def __init__(self, shape: bool = False) -> None:
        super().__init__()
        self.fc, self.calls, self.shape = nn.Linear(6, 3), 0, shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.fc(x)[: self.calls] if self.shape else self.fc(x) + self.calls


def test_a_model_that_does_not_repeat_itself_warns_with_the_spread() -> None:
    with pytest.warns(UserWarning, match="not deterministic.* differ by up to 1;"):
        build_graph(Noisy(), X)


def test_a_model_whose_output_changes_shape_warns() -> None:
    with pytest.warns(UserWarning, match=r"not deterministic.* shapes \[1, 3\] and \[2, 3\]"):
        build_graph(Noisy(shape=True), X)


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(input=x)


def test_a_layer_called_by_keyword_is_refused_by_name() -> None:
    with pytest.raises(InvalidInputError, match="layer 'fc' gets its input as a keyword"):
        build_graph(model := Keyword(), X)
    assert not model.fc._forward_hooks  # gone after the error


def test_a_layer_may_be_the_whole_model() -> None:
    graph = build_graph(nn.Linear(6, 3), X)
    assert (graph.layers[0].weight_id, members(graph)) == ("weight", [("",)])


class _ScaledEmbedding(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 8


class _Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


def test_a_layer_with_a_forward_of_its_own_is_left_out_by_reason() -> None:
    model = nn.Sequential(_Standardised(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    graph = build_graph(model, torch.randn(1, 1, 4, 4))
    assert [unit.name for unit in graph.units] == ["2"]
    (part,) = [p for p in graph.unsearched if p.name == "0.weight"]
    assert "_Standardised.forward is not that of a conv2d" in part.reason
    words = nn.Sequential(_ScaledEmbedding(5, 4), nn.Linear(4, 2))
    graph = build_graph(words, torch.tensor([[1, 2]]), embeddings=True)
    assert [unit.name for unit in graph.units] == ["1"]


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch: it copies the input
def test_an_even_kernel_that_keeps_the_size_pads_one_more_at_the_end() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, (4, 3), padding="same", dilation=(1, 2)))
    conv = build_graph(model, torch.randn(1, 3, 8, 8)).layers[0].convolution
    assert conv is not None
    assert (conv.padding, conv.padding_end) == ((1, 2), (2, 2))


def test_complex_parameters_stay_outside_and_are_not_taken_for_quantized() -> None:
    model = mlp()
    model.register_parameter("spectral", nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64)))
    model.unused = nn.Linear(2, 2, dtype=torch.complex64)
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    graph = build_graph(model, X)
    assert members(graph) == [("0",), ("2",)]
    assert "2-d parameter" in reasons(graph)["spectral"]
    assert "2-d parameter" in reasons(graph)["unused.weight"]


class WithBias(nn.Linear):
    """Returns its bias beside its output, as layers of model-parallel libraries do."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), self.bias


class Unusual(nn.Module):
    """A layer that returns a tuple, a layer tied to it, and attention that calls no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.tied, self.head = WithBias(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.tied.weight = self.pair.weight
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tied(self.pair(x)[0])[None]
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def test_layers_that_cannot_be_replaced_are_left_out_with_the_reason() -> None:
    graph = build_graph(Unusual(), X)
    assert members(graph) == [("head",)]
    assert graph.by_name["pair"].macs == 4 * 36
    outside = reasons(graph)
    assert "returns a tuple" in outside["pair.weight"]
    assert "without being called" in outside["attention.out_proj.weight"]
