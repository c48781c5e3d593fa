"""Quality functions: how much worse an output became, one number for each sample.

A quality function takes (reference output, changed output, batch) and returns a tensor of one
degradation per sample: 0 for equal outputs, larger is worse, and to first order the degradations
of several changed layers add up. The outputs are the tensors that mpq.nn.batches.output_tensor
picks; a function of the user's own may look at any part of them.

    kl      mean over positions of KL(softmax z || softmax z')
    cosine  mean over positions of 1 - cos(z, z')
    mse     mean over positions and features of (z - z')^2
    sqnr    noise-to-signal power |z' - z|^2 / |z|^2: 10^(-SQNR in dB / 10), which unlike dB adds up
    ssim    1 - SSIM of images (samples, channels, height, width)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mpq.core.errors import InvalidInputError, unknown
from mpq.nn.batches import Batch, position_mask
from mpq.nn.divergence import Kind, OutputDivergence

Quality = Callable[[torch.Tensor, torch.Tensor, Batch], torch.Tensor]

_WINDOW, _SIGMA = 11, 1.5  # of SSIM's Gaussian, in pixels
_K1, _K2 = 0.01, 0.03


def _divergence(
    kind: Kind, reference: torch.Tensor, changed: torch.Tensor, batch: Batch
) -> torch.Tensor:
    return OutputDivergence(kind).between(reference, changed, position_mask(batch, changed))


def kl(reference: torch.Tensor, changed: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return KL(softmax z || softmax z') of each sample, the mean over positions."""
    return _divergence("kl", reference, changed, batch)


def cosine(reference: torch.Tensor, changed: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return 1 - cos(z, z') of each sample, the mean over positions."""
    return _divergence("cosine", reference, changed, batch)


def mse(reference: torch.Tensor, changed: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the mean squared difference of each sample."""
    return _divergence("mse", reference, changed, batch)


def sqnr(reference: torch.Tensor, changed: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the noise power of each sample over its signal power; padded positions count not."""
    signal, noise = reference.double(), changed.double() - reference.double()
    mask = position_mask(batch, changed)
    if mask is not None:
        signal, noise = signal * mask.unsqueeze(-1), noise * mask.unsqueeze(-1)
    power = signal.square().reshape(len(signal), -1).sum(1)
    return noise.square().reshape(len(noise), -1).sum(1) / power.clamp_min(1e-300)


def ssim(reference: torch.Tensor, changed: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return 1 - SSIM of each image, the mean over windows and channels.

    SSIM = (2 m m' + C1)(2 cov + C2) / ((m^2 + m'^2 + C1)(v + v' + C2)), with local means m,
    variances v and covariance under a Gaussian window of 11 pixels and sigma 1.5 that lies wholly
    inside the image, C1 = (0.01 L)^2, C2 = (0.03 L)^2 (Wang et al. 2004, eq. 13). The dynamic
    range L is that of the reference image, since outputs are in no fixed range; an image smaller
    than the window has the largest odd window that fits.
    """
    if reference.ndim != 4:
        raise InvalidInputError(
            "quality",
            f"ssim compares images (samples, channels, height, width), the model's output is "
            f"{list(reference.shape)}: choose another quality or write your own function",
        )
    x, y = reference.double(), changed.double()
    flat = x.flatten(1)
    span = flat.amax(1) - flat.amin(1)
    level = torch.where(span > 0, span, flat.abs().amax(1)).clamp_min(1e-12)  # constant images
    c1 = (_K1 * level).square().reshape(-1, 1, 1, 1)
    c2 = (_K2 * level).square().reshape(-1, 1, 1, 1)
    mean_x, mean_y = _local_mean(x), _local_mean(y)
    # what is left of the mean of products cancels badly far from 0: centre each image first
    centre = flat.mean(1).reshape(-1, 1, 1, 1)
    x, y = x - centre, y - centre
    near_x, near_y = mean_x - centre, mean_y - centre
    variance_x = _local_mean(x * x) - near_x.square()
    variance_y = _local_mean(y * y) - near_y.square()
    covariance = _local_mean(x * y) - near_x * near_y
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similar /= (mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2)
    return 1 - similar.flatten(1).mean(1)


def _local_mean(images: torch.Tensor) -> torch.Tensor:
    """Return the Gaussian-weighted mean around each pixel whose window is inside the image."""
    for axis in (2, 3):
        size = min(_WINDOW, images.shape[axis] - 1 + images.shape[axis] % 2)
        place = torch.arange(size, dtype=images.dtype, device=images.device) - (size - 1) / 2
        weights = torch.exp(-place.square() / (2 * _SIGMA**2)).to(images.device)
        windows = images.unfold(axis, size, 1)
        images = windows @ (weights / weights.sum())
    return images


QUALITIES: dict[str, Quality] = {
    "kl": kl,
    "cosine": cosine,
    "mse": mse,
    "sqnr": sqnr,
    "ssim": ssim,
}


def get_quality(name: str) -> Quality:
    """Return a quality function by name; raises InvalidInputError for an unknown one."""
    if name not in QUALITIES:
        raise unknown("quality", name, QUALITIES)
    return QUALITIES[name]


def degradations(
    qualities: Mapping[str, Quality],
    reference: torch.Tensor,
    changed: torch.Tensor,
    batch: Batch,
) -> dict[str, torch.Tensor]:
    """Return each quality's degradation of every sample, float64 of shape (samples,).

    A sample whose changed output is not finite is infinitely worse. Raises InvalidInputError
    where a function fails, returns another shape, or is not finite for a finite output.
    """
    broken = ~torch.isfinite(changed).reshape(len(changed), -1).all(1)
    return {
        name: _checked(name, function, reference, changed, batch, broken)
        for name, function in qualities.items()
    }


def _checked(
    name: str,
    function: Quality,
    reference: torch.Tensor,
    changed: torch.Tensor,
    batch: Batch,
    broken: torch.Tensor,
) -> torch.Tensor:
    try:
        found = function(reference, changed, batch)
    except InvalidInputError as error:
        raise InvalidInputError(error.code, f"quality {name!r}: {error}") from error
    except Exception as error:  # whatever a user's function raises
        said = (str(error).strip().splitlines() or [""])[0]
        raise InvalidInputError(
            "quality", f"quality {name!r} failed: {type(error).__name__}: {said}"
        ) from error
    samples = len(reference)
    if not isinstance(found, torch.Tensor) or found.shape != (samples,):
        got = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise InvalidInputError(
            "quality",
            f"quality {name!r} must return a tensor of one number per sample, [{samples}], it "
            f"returned {got}",
        )
    values = found.detach().double().cpu()
    values[broken.cpu()] = torch.inf
    unknown_value = ~torch.isfinite(values) & ~broken.cpu()
    if unknown_value.any():
        sample = int(unknown_value.nonzero()[0, 0])
        raise InvalidInputError(
            "quality",
            f"quality {name!r} is {float(values[sample])} for sample {sample} although the output "
            f"is finite: it must return finite numbers",
        )
    return values
