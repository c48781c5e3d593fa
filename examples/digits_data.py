"""The scikit-learn digits as 16x16 images, split 60/40, with the pieces both classifiers share.

1797 images of 8x8 pixels (values 0..16, 10 classes) are scaled to [0, 1], resized to 16x16
(bilinear) and normalised with the mean and standard deviation of the training images. The split
is stratified with a fixed seed: 1078 training images, 719 test images. No download is needed, as
scikit-learn carries the data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from examples.splits import check_split

Batch = tuple[Tensor, Tensor]

IMAGE_SIZE = 16
NUM_CLASSES = 10
SPLIT_SEED = 0
TEST_FRACTION = 0.4
CALIBRATION_IMAGES = 512
BATCH_SIZE = 64
CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"


class Digits(NamedTuple):
    """Images are float32 (N, 1, 16, 16), labels int64 (N,); N is 1078 and 719."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@lru_cache(maxsize=1)
def load_split() -> Digits:
    """Return the resized, normalised digits; callers must not write into the tensors."""
    data = load_digits()
    labels = torch.from_numpy(data.target).to(torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=TEST_FRACTION, random_state=SPLIT_SEED, stratify=data.target
    )
    pixels = torch.from_numpy(data.images).to(torch.float32).unsqueeze(1) / 16.0
    images = F.interpolate(
        pixels, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False
    )
    std, mean = torch.std_mean(images[train])
    images = (images - mean) / std
    return Digits(images[train], labels[train], images[test], labels[test])


def make_batches(split: str = "calibration") -> list[Batch]:
    """Return (images, labels) batches of at most 64.

    "calibration" holds 512 training images (8 batches), "held_out" the 719 test images (12
    batches, the last of 15). Every call returns fresh tensors.
    """
    check_split(split)
    digits = load_split()
    if split == "calibration":
        images = digits.train_images[:CALIBRATION_IMAGES]
        labels = digits.train_labels[:CALIBRATION_IMAGES]
    else:
        images, labels = digits.test_images, digits.test_labels
    parts = [slice(i, i + BATCH_SIZE) for i in range(0, len(labels), BATCH_SIZE)]
    return [(images[part].clone(), labels[part].clone()) for part in parts]


def loss(output: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross-entropy (a scalar) of logits (N, 10) against the batch's labels."""
    return F.cross_entropy(output, batch[1])


def evaluate(model: nn.Module) -> dict[str, float]:
    """Return accuracy and mean cross-entropy on the 719 test images, in evaluation mode."""
    return _evaluated(model, make_batches("held_out"))


def evaluate_both(model: nn.Module) -> dict[str, float]:
    """Return the accuracy on the 512 calibration images, and that on the 719 test images.

    For a limit: "accuracy" may decide, as the test images then still judge.
    """
    found = {split: _evaluated(model, make_batches(split)) for split in ("calibration", "held_out")}
    return {
        "accuracy": found["calibration"]["accuracy"],
        "test accuracy": found["held_out"]["accuracy"],
    }


def _evaluated(model: nn.Module, batches: list[Batch]) -> dict[str, float]:
    was_training = model.training
    model.eval()
    correct, total_loss, count = 0, 0.0, 0
    with torch.no_grad():
        for images, labels in batches:
            logits = model(images)
            correct += int((logits.argmax(dim=1) == labels).sum())
            total_loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
    model.train(was_training)
    return {"accuracy": correct / count, "cross_entropy": total_loss / count}


def load_checkpoint(build: Callable[[], nn.Module], name: str) -> nn.Module:
    """Build a model, fill it from checkpoints/digits_<name>.safetensors, return it in eval mode.

    The global random state is left as it was.
    """
    path = CHECKPOINTS / f"digits_{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {path} is missing; make it with: python -m examples.train_digits {name}"
        )
    with torch.random.fork_rng(devices=[]):
        model = build()
    model.load_state_dict(load_file(path))
    return model.eval()
