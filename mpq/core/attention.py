"""The attention of a decoder as arithmetic: cached keys and values, products with them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Heads of every layer, and how far back each layer looks (None: to the beginning)."""

    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # one for each layer

    def cached(self, context: int) -> int:
        """Return the positions that a sequence of `context` tokens keeps, over all layers."""
        return sum(min(context, window or context) for window in self.windows)

    def cache_bytes(self, context: int, batch: int, element_bytes: int) -> int:
        """Return the bytes of the KV cache.

        2 (keys and values) * kv_heads * head_dim * positions of all layers * batch * bytes.
        """
        return 2 * self.kv_heads * self.head_dim * self.cached(context) * batch * element_bytes

    def prefill_macs(self, tokens: int, batch: int) -> int:
        """Return the multiply-accumulates of queries with keys and of weights with values.

        Causal: token i meets min(i, window) others, so n (n + 1) / 2 pairs without a window.
        """
        pairs = 0
        for window in self.windows:
            near = min(tokens, window or tokens)
            pairs += near * (near + 1) // 2 + (tokens - near) * near
        return 2 * self.heads * self.head_dim * pairs * batch

    def decode_macs(self, context: int, batch: int) -> int:
        """Return the multiply-accumulates of one more token after `context` cached ones."""
        return 2 * self.heads * self.head_dim * self.cached(context) * batch
