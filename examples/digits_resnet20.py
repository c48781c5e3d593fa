"""ResNet-20 in the CIFAR style (0.27 M parameters, batch norm) on 16x16 digits.

22 layers carry weights: 19 convolutions of 3x3, two 1x1 shortcut convolutions, one linear layer.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits_data import (
    NUM_CLASSES,
    Batch,
    evaluate,
    load_checkpoint,
    loss,
    make_batches,
)

__all__ = [
    "DIVERGENCE",
    "build_model",
    "calibration_batches",
    "evaluate",
    "held_out_batches",
    "loss",
    "make_batches",
    "make_model",
]

DIVERGENCE = "kl"

WIDTHS = (16, 32, 64)
BLOCKS_PER_STAGE = 3


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    """Convolution without bias (padding keeps the size at stride 1), then batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; (N, C, H, W) to (N, outputs, H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (N, C, H, W) to (N, outputs, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet20(nn.Module):
    """Stem, three stages of three blocks (16, 32, 64 channels), mean pool, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, WIDTHS[0], 3, 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        blocks: list[nn.Module] = []
        inputs = WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            for index in range(BLOCKS_PER_STAGE):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(BasicBlock(inputs, width, stride))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 1, 16, 16) to logits (N, 10)."""
        features = self.blocks(F.relu(self.bn1(self.conv1(images))))
        logits: Tensor = self.fc(features.mean(dim=(2, 3)))
        return logits


def build_model() -> ResNet20:
    """Return an untrained network, initialised from the global random state."""
    return ResNet20()


def make_model() -> nn.Module:
    """Return the trained network: float32, eval mode, a fresh object on each call."""
    return load_checkpoint(build_model, "resnet20")


def calibration_batches() -> list[Batch]:
    """Return 512 training images in 8 batches of 64."""
    return make_batches("calibration")


def held_out_batches() -> list[Batch]:
    """Return the 719 test images in 12 batches of at most 64."""
    return make_batches("held_out")
