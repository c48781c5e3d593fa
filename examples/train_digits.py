"""Train the digits classifiers and write their checkpoints.

Usage: python -m examples.train_digits resnet20|vit|all

Each takes about a minute or two on two cores. The recipe is fixed (seed, epochs, last epoch kept,
no choice made on the test images), but other versions of torch or other processors can give
slightly different weights.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from examples import digits_resnet20, digits_vit
from examples.digits_data import CHECKPOINTS, evaluate, load_split


@dataclass(frozen=True)
class Recipe:
    """How one classifier is trained: AdamW, one-cycle learning rate.

    The ViT needs augmented images to generalise; label smoothing keeps its logits finite, so that
    the loss still has gradients to measure sensitivity with once training has ended. The ResNet
    is trained plainly.
    """

    build: Callable[[], nn.Module]
    epochs: int
    learning_rate: float
    weight_decay: float
    seed: int = 0
    batch_size: int = 64
    label_smoothing: float = 0.0
    max_shift: float = 0.0
    max_degrees: float = 0.0


RECIPES = {
    "resnet20": Recipe(digits_resnet20.build_model, 30, 5e-3, 1e-2),
    "vit": Recipe(
        digits_vit.build_model,
        50,
        2e-3,
        5e-2,
        label_smoothing=0.05,
        max_shift=2.0,
        max_degrees=10.0,
    ),
}


def augment(images: Tensor, recipe: Recipe) -> Tensor:
    """Rotate and shift each image (N, 1, H, W) by a random angle and number of pixels."""
    n, size = len(images), images.shape[-1]
    angle = (torch.rand(n) * 2 - 1) * math.radians(recipe.max_degrees)
    shift = (torch.rand(n, 2) * 2 - 1) * recipe.max_shift * 2 / size
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1)
    grid = F.affine_grid(rows.view(n, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train(recipe: Recipe) -> nn.Module:
    """Train on the 1078 training images and return the model of the last epoch in eval mode."""
    torch.manual_seed(recipe.seed)
    images, labels = load_split()[:2]
    model = recipe.build().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    steps = recipe.epochs * math.ceil(len(images) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=steps
    )
    objective = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    for epoch in range(recipe.epochs):
        total = 0.0
        order = torch.randperm(len(images))
        for start in range(0, len(images), recipe.batch_size):
            index = order[start : start + recipe.batch_size]
            value = objective(model(augment(images[index], recipe)), labels[index])
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += value.item() * len(index)
        print(f"epoch {epoch + 1:3d}/{recipe.epochs}  training loss {total / len(images):.4f}")
    return model.eval()


def train_and_save(name: str) -> None:
    """Train the named classifier, print its test metrics, write its checkpoint."""
    recipe = RECIPES[name]
    start = time.perf_counter()
    model = train(recipe)
    metrics = evaluate(model)
    path = CHECKPOINTS / f"digits_{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    metadata = {
        "seed": str(recipe.seed),
        "epochs": str(recipe.epochs),
        "test_accuracy": f"{metrics['accuracy']:.4f}",
        "test_cross_entropy": f"{metrics['cross_entropy']:.4f}",
    }
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, path, metadata=metadata)
    print(f"{path.name}: {metadata} in {time.perf_counter() - start:.0f} s")


def main() -> None:
    """Parse the command line and train what it names."""
    parser = argparse.ArgumentParser(description="Train the digits example models.")
    parser.add_argument("model", choices=[*RECIPES, "all"])
    choice = parser.parse_args().model
    torch.set_num_threads(2)
    for name in RECIPES if choice == "all" else [choice]:
        train_and_save(name)


if __name__ == "__main__":
    main()
