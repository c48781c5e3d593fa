"""Quality functions against slow computations, and what is said of wrong ones."""

from __future__ import annotations

import math

import pytest
import torch

from mpq.core.errors import InvalidInputError
from mpq.nn.quality import QUALITIES, Quality, degradations, get_quality, sqnr, ssim


def slow_ssim(x: torch.Tensor, y: torch.Tensor) -> float:
    """SSIM of one image (channels, height, width), window by window in plain Python."""
    level = float(x.max() - x.min()) or float(x.abs().max())
    c1, c2 = (0.01 * level) ** 2, (0.03 * level) ** 2
    channels, height, width = x.shape

    def bell(length: int) -> list[float]:
        size = min(11, length if length % 2 else length - 1)
        weights = [math.exp(-((i - (size - 1) / 2) ** 2) / (2 * 1.5**2)) for i in range(size)]
        return [w / sum(weights) for w in weights]

    down, across = bell(height), bell(width)
    found = []
    for channel in range(channels):
        for top in range(height - len(down) + 1):
            for left in range(width - len(across) + 1):
                pixels = [
                    (
                        a * b,
                        float(x[channel, top + i, left + j]),
                        float(y[channel, top + i, left + j]),
                    )
                    for i, a in enumerate(down)
                    for j, b in enumerate(across)
                ]
                mx, my = sum(w * p for w, p, _ in pixels), sum(w * q for w, _, q in pixels)
                vx = sum(w * (p - mx) ** 2 for w, p, _ in pixels)
                vy = sum(w * (q - my) ** 2 for w, _, q in pixels)
                cov = sum(w * (p - mx) * (q - my) for w, p, q in pixels)
                found.append(
                    (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
                )
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("shape", "offset"),
    [((2, 2, 13, 12), 0.0), ((2, 1, 6, 5), 0.0), ((1, 1, 11, 11), 1e4), ((2, 1, 1, 2), 0.0)],
    ids=["window", "small image", "far from zero", "two pixels"],
)
def test_ssim_is_that_of_every_window(shape: tuple[int, ...], offset: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) + offset
    y = x + 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    slow = [1 - slow_ssim(a, b) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(
        ssim(x, y, x), torch.tensor(slow, dtype=torch.float64), rtol=1e-7, atol=1e-12
    )


def test_ssim_of_constant_images() -> None:
    black, grey = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.5)
    assert torch.equal(ssim(black, black, black), torch.zeros(2, dtype=torch.float64))
    assert torch.equal(ssim(grey, grey, grey), torch.zeros(2, dtype=torch.float64))
    assert (ssim(grey, black, grey) > 0.9).all()


def test_sqnr_is_noise_over_signal_of_real_positions() -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, 4, 5, generator=generator)
    noisy = z + 0.1 * torch.randn(3, 4, 5, generator=generator)
    mask = torch.ones(3, 4)
    mask[1, 2:] = 0
    noisy[1, 2:] = 99.0
    found = sqnr(z, noisy, {"input_ids": mask, "attention_mask": mask})
    for sample in range(3):
        kept = mask[sample].bool()
        signal, noise = z[sample][kept].double(), (noisy - z)[sample][kept].double()
        assert float(found[sample]) == pytest.approx(
            float((noise**2).sum() / (signal**2).sum()), rel=1e-6
        )
    decibel = -10 * math.log10(float(found[0]))
    assert decibel == pytest.approx(
        10 * math.log10(float((z[0] ** 2).sum() / ((noisy - z)[0] ** 2).sum())), rel=1e-5
    )


@pytest.mark.parametrize("name", sorted(QUALITIES))
def test_equal_outputs_cost_nothing_and_small_changes_cost_their_square(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(4, 2, 12, 12, generator=generator, dtype=torch.float64)
    change = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    quality = QUALITIES[name]
    assert quality(z, z, z).shape == (4,)
    assert quality(z, z, z).abs().max() < 1e-12
    small, double = quality(z, z + 1e-4 * change, z), quality(z, z + 2e-4 * change, z)
    assert (small > 0).all()
    torch.testing.assert_close(double / small, torch.full_like(small, 4.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["mse", "sqnr"])
def test_orthogonal_errors_add_up(name: str) -> None:
    z = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    one, other = torch.zeros_like(z), torch.zeros_like(z)
    one[:, :4], other[:, 4:] = 0.5, -0.25
    quality = QUALITIES[name]
    together = quality(z, z + one + other, z)
    torch.testing.assert_close(together, quality(z, z + one, z) + quality(z, z + other, z))


def test_an_unknown_quality_gets_the_nearest_one() -> None:
    with pytest.raises(InvalidInputError, match=r"unknown quality 'sim': did you mean 'ssim'\?"):
        get_quality("sim")


def test_ssim_of_what_is_no_image_is_refused() -> None:
    z = torch.zeros(2, 10)
    with pytest.raises(
        InvalidInputError, match=r"quality 'look': ssim compares images .*\[2, 10\]"
    ):
        degradations({"look": ssim}, z, z, z)


def fails(*_: object) -> torch.Tensor:
    raise KeyError("labels")


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (
            lambda z, y, b: (z - y).square().mean(),
            r"one number per sample, \[3\], it returned \[\]",
        ),
        (lambda z, y, b: (z - y).square(), r"it returned \[3, 4\]"),
        (lambda z, y, b: 0.0, r"it returned float"),
        (lambda z, y, b: z[:, 0] / 0.0, r"quality 'mine' is (nan|inf|-inf) for sample 0"),
        (fails, r"quality 'mine' failed: KeyError: 'labels'"),
    ],
    ids=["mean over the batch", "per feature", "a float", "not finite", "raises"],
)
def test_a_wrong_function_is_one_line(function: Quality, line: str) -> None:
    z = torch.ones(3, 4)
    with pytest.raises(InvalidInputError, match=line) as caught:
        degradations({"mine": function}, z, z, z)
    assert caught.value.code == "quality"
    assert "\n" not in str(caught.value)


def test_a_broken_output_is_infinitely_worse_and_no_error() -> None:
    z = torch.ones(3, 4)
    broken = z.clone()
    broken[1, 2] = torch.nan
    found = degradations({"mse": QUALITIES["mse"]}, z, broken, z)["mse"]
    assert found.tolist() == [0.0, math.inf, 0.0]
