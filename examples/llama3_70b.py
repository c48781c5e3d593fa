"""Llama 3 70B by its published config: a network to plan, far larger than this machine.

    mpq plan examples.llama3_70b:make_config --bits 4.0 --hardware roofline:H100

The numbers are those of the released config.json (Llama 3 70B, April 2024). No weights are needed.
"""

from __future__ import annotations

from typing import Any


def make_config() -> Any:
    """Return the config of Llama 3 70B."""
    import transformers

    return transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        bos_token_id=128000,
        eos_token_id=128001,
        dtype="bfloat16",
    )
