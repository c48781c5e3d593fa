from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mpq.choices import make_cells, parse_schemes
from mpq.core.errors import InvalidInputError
from mpq.core.formats import Scheme
from mpq.core.layers import Layer
from mpq.nn.graph import build_graph
from tests.builders import Block, Decoder, conv_net, mlp, schemes, tokens

INT4, INT8, GROUPED = schemes("int4", "int8", "int4g8")
BLOCK = build_graph(Block(), torch.randn(2, 5, 8))


def both(layer: Layer) -> Sequence[Scheme]:
    return (INT4, INT8)


def test_schemes_are_read_in_order() -> None:
    assert parse_schemes(["int8", INT4]) == (INT8, INT4)


def test_a_repeated_scheme_is_dropped_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="listed more than once: int4"):
        assert parse_schemes(["int4", "int8", "int4", INT4]) == (INT4, INT8)


def test_an_empty_list_of_schemes_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="the list of schemes is empty"):
        parse_schemes([])


def test_a_text_is_no_list_of_schemes() -> None:
    with pytest.raises(InvalidInputError, match="a list of texts, got 'int4'"):
        parse_schemes("int4")


@pytest.mark.parametrize("bad", ["int0", "int9", "int33", 4, 4.0, None, ""])
def test_a_malformed_scheme_is_refused_with_its_value(bad: object) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_schemes(["int4", bad])  # type: ignore[list-item]
    assert repr(bad) in str(caught.value)


def test_every_unit_gets_the_schemes_of_its_layers() -> None:
    cells = make_cells(BLOCK, both)
    assert cells.units == tuple(unit.name for unit in BLOCK.units)
    assert set(cells.schemes) == {(INT4, INT8)}


def test_a_unit_takes_what_all_its_layers_may() -> None:
    def uneven(layer: Layer) -> Sequence[Scheme]:
        return (INT8,) if layer.name == "k_proj" else (INT4, INT8)

    cells = make_cells(BLOCK, uneven)
    assert cells.schemes == ((INT8,), (INT4, INT8), (INT4, INT8), (INT4, INT8))


def test_layers_without_a_common_scheme_are_refused() -> None:
    def disjoint(layer: Layer) -> Sequence[Scheme]:
        return (INT8,) if layer.name == "k_proj" else (INT4,)

    with pytest.raises(InvalidInputError, match=r"fits all layers of '\{q_proj,k_proj,v_proj\}'"):
        make_cells(BLOCK, disjoint)


@pytest.mark.parametrize("pattern", ["k_proj", "k_*", "[qkv]_proj"])
def test_a_pinned_layer_fixes_its_unit(pattern: str) -> None:
    cells = make_cells(BLOCK, both, {pattern: "int8"})
    assert cells.schemes == ((INT8,), (INT4, INT8), (INT4, INT8), (INT4, INT8))


def test_a_pin_may_be_a_scheme_that_was_not_a_choice() -> None:
    cells = make_cells(BLOCK, both, {"o_proj": schemes("bf16")[0]})
    assert cells.schemes[1] == schemes("bf16")


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"q_proj": "int4", "k_proj": "int8"}, "shares one scheme but is pinned to int4 and int8"),
        ({"q_porj": "int4"}, "pin pattern 'q_porj' matches no layer: did you mean 'q_proj'"),
        ({"q_proj": "int44"}, "integer formats have 1 to 8 bits, got 44"),
        ({"o_proj": "int4g5"}, "int4g5 does not fit layer 'o_proj': group size 5 does not divide"),
    ],
)
def test_malformed_pins_are_refused(pins: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make_cells(BLOCK, both, pins)


def test_a_skipped_layer_cannot_be_pinned() -> None:
    graph = build_graph(mlp(), torch.randn(2, 6), skip=["0"])
    with pytest.raises(InvalidInputError, match="pin pattern '0' matches no layer"):
        make_cells(graph, both, {"0": "int8"})


def test_a_group_size_that_does_not_divide_names_layer_and_remedies() -> None:
    graph = build_graph(mlp(), torch.randn(2, 6))
    with pytest.raises(InvalidInputError, match=r"'0'.*group size 8.*skip=\['0'\]") as caught:
        make_cells(graph, lambda layer: (GROUPED, INT8))
    assert caught.value.code == "group_size"


def test_a_layer_that_groups_do_not_divide_may_be_pinned() -> None:
    graph = build_graph(mlp(), torch.randn(2, 6))
    cells = make_cells(graph, lambda layer: (GROUPED, INT8), {"0": "int8"})
    assert cells.schemes == ((INT8,), (GROUPED, INT8))


def test_an_embedding_takes_no_activation_format() -> None:
    graph = build_graph(Decoder(tied=False), tokens(), embeddings=True)
    with pytest.raises(InvalidInputError, match="embedding 'embed' reads indices"):
        make_cells(graph, lambda layer: schemes("int8:int8"))


def test_a_native_format_wider_than_the_weights_is_refused() -> None:
    model = mlp().to(torch.bfloat16)
    graph = build_graph(model, torch.randn(2, 6).to(torch.bfloat16))
    with pytest.raises(InvalidInputError, match="fp32 is wider than the 16-bit weights of layer"):
        make_cells(graph, lambda layer: schemes("int4", "fp32"))


def test_one_candidate_is_enough() -> None:
    assert len(make_cells(BLOCK, lambda layer: (INT4,))) == len(BLOCK.units)


def test_groups_that_do_not_divide_become_a_scale_for_each_channel_on_request() -> None:
    graph = build_graph(mlp(inputs=12), torch.randn(2, 12))
    asked = schemes("int4g8", "int8", "int4")
    with pytest.warns(UserWarning, match="unit '0': the groups of int4g8 do not divide") as told:
        found = make_cells(graph, lambda _: asked, on_indivisible="channel")
    assert len(told) == 1
    assert list(map(str, found.schemes[0])) == ["int4", "int8"]
    assert list(map(str, found.schemes[1])) == ["int4g8", "int8", "int4"]
    with pytest.raises(InvalidInputError, match="on_indivisible='channel' does"):
        make_cells(graph, lambda _: asked)


def test_blocks_that_are_part_of_a_format_have_no_fallback() -> None:
    graph = build_graph(mlp(inputs=12), torch.randn(2, 12))
    with pytest.raises(InvalidInputError, match="mxfp4 does not fit layer '0'"):
        make_cells(graph, lambda _: schemes("mxfp4"), on_indivisible="channel")


def test_a_branch_of_too_high_a_rank_is_refused_with_the_layer() -> None:
    graph = build_graph(mlp(inputs=12), torch.randn(2, 12))
    with pytest.raises(InvalidInputError, match=r"int4\+r99 does not fit layer '0'"):
        make_cells(graph, lambda _: schemes("int4+r99"))


def test_blocks_of_activations_lie_along_the_inputs_of_linear_layers() -> None:
    graph = build_graph(conv_net(), torch.randn(2, 3, 8, 8))
    with pytest.raises(InvalidInputError, match="blocks of activations lie along the inputs"):
        make_cells(graph, lambda _: schemes("int8:bfp8g2"))


def test_blocks_of_activations_that_do_not_divide_are_refused_with_the_layer() -> None:
    graph = build_graph(mlp(inputs=12), torch.randn(2, 12))
    told = "int8:mxfp8_e4m3 does not fit layer '0': blocks of 32 do not divide its 12 inputs"
    with pytest.raises(InvalidInputError, match=told):
        make_cells(graph, lambda _: schemes("int8:mxfp8_e4m3"))
