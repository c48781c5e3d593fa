from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mpq.nn.divergence import OutputDivergence, detect
from tests.oracles import slow_divergence

KINDS = ("kl", "cosine", "mse")
SHAPES = {"classes": (4, 5), "tokens": (3, 4, 5), "grid": (2, 3, 2, 2, 4)}


def pair(shape: tuple[int, ...], step: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    return z, z + step * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_equals_its_formula(kind: str, shape: tuple[int, ...]) -> None:
    z, other = pair(shape)
    found = OutputDivergence(kind).between(z, other)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, slow_divergence(kind, z.numpy(), other.numpy()), rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_count_for_nothing(kind: str) -> None:
    z, other = pair((3, 4, 5))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    found = OutputDivergence(kind).between(z, other, mask)  # type: ignore[arg-type]
    expected = slow_divergence(kind, z.numpy(), other.numpy(), mask.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_without_a_real_position_diverges_by_nothing(kind: str) -> None:
    z, other = pair((2, 4, 5))
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    assert OutputDivergence(kind).between(z, other, mask)[0] == 0  # type: ignore[arg-type]


def test_classes_of_image_maps_are_on_axis_one() -> None:
    z, other = pair((2, 5, 3, 4))
    found = OutputDivergence("kl").between(z, other)
    last = [np.moveaxis(part.numpy(), 1, -1) for part in (z, other)]
    np.testing.assert_allclose(found, slow_divergence("kl", *last), rtol=1e-10)


def test_one_number_a_sample_is_compared_by_its_square() -> None:
    z, other = pair((6,))
    found = OutputDivergence("mse").between(z, other)
    torch.testing.assert_close(found, (z - other) ** 2)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_outputs_do_not_diverge(kind: str) -> None:
    z, _ = pair((3, 4, 5))
    found = OutputDivergence(kind).between(z, z)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_small_divergences_of_float32_outputs_are_not_lost(kind: str) -> None:
    z = pair((3, 4, 5))[0].float()
    other = z * (1 + 1e-5 * torch.arange(5.0))
    found = OutputDivergence(kind).between(z, other)  # type: ignore[arg-type]
    wide = slow_divergence(kind, z.double().numpy(), other.double().numpy())
    np.testing.assert_allclose(found, wide, rtol=1e-4, atol=1e-15)


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (torch.nn.functional.normalize(torch.randn(4, 8), dim=-1), "cosine"),
        (torch.nn.functional.normalize(torch.randn(2, 4, 8), dim=-1), "cosine"),
        (torch.randn(4, 8), "kl"),
        (torch.randn(2, 4, 8), "kl"),
        (torch.randn(2, 3, 4, 4), "kl"),
        (torch.randn(4, 1), "mse"),
        (torch.randn(4), "mse"),
        (torch.ones(4), "mse"),
        (torch.randn(2, 1, 4, 4), "mse"),
    ],
    ids=lambda v: v if isinstance(v, str) else str(list(v.shape)),
)
def test_the_divergence_is_detected_from_the_output(output: torch.Tensor, kind: str) -> None:
    assert detect(output) == kind


TINY = {
    "classes": ((2, 4), None),
    "tokens": ((2, 2, 3), None),
    "masked": ((2, 2, 3), torch.tensor([[1, 0], [1, 1]])),
    "map": ((2, 3, 1, 2), None),
}


def second_order(
    divergence: OutputDivergence,
    z: torch.Tensor,
    other: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return 1/2 E <S r, dh>^2 of each sample, the mean over every sign vector r of a sample."""
    head = divergence.head(z)
    change = divergence.head(other) - head
    squares = []
    for signs in itertools.product((-1.0, 1.0), repeat=head[0].numel()):
        same = torch.tensor(signs, dtype=z.dtype).reshape(head[0].shape).expand_as(head)
        inner = (divergence.seeds(head, same, mask) * change).flatten(1).sum(1)
        squares.append(inner.square())
    return 0.5 * torch.stack(squares).mean(0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [*itertools.product(KINDS, TINY), ("mse", "number")],
)
def test_seeds_give_the_divergence_to_second_order(kind: str, name: str) -> None:
    shape, mask = TINY.get(name, ((3,), None))
    divergence = OutputDivergence(kind)  # type: ignore[arg-type]
    gaps = []
    for step in (1e-2, 1e-3):
        z, other = pair(shape, step)
        ratio = second_order(divergence, z, other, mask) / divergence.between(z, other, mask)
        gaps.append(float((ratio - 1).abs().max()))
    assert gaps[0] < 0.1
    assert gaps[1] < max(0.2 * gaps[0], 1e-9)  # third order: ten times closer at a tenth the step


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_keep_the_dtype_and_shape_of_the_head(kind: str) -> None:
    divergence = OutputDivergence(kind)  # type: ignore[arg-type]
    head = divergence.head(torch.randn(2, 3, 4, dtype=torch.bfloat16))
    seeds = divergence.seeds(head, torch.ones_like(head), torch.ones(2, 3, dtype=torch.int64))
    assert (seeds.dtype, seeds.shape) == (torch.bfloat16, head.shape)


def test_the_head_is_differentiable() -> None:
    for kind in KINDS:
        z = torch.randn(2, 3, requires_grad=True)
        OutputDivergence(kind).head(z).sum().backward()  # type: ignore[arg-type]
        assert z.grad is not None
