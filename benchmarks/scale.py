"""What scoring a network of 70 G parameters on 64 GPUs would take: arithmetic, nothing is run.

The formulas and what they leave out are in docs/scale.md, which holds what this prints.
Run: python -m benchmarks.scale
"""

from __future__ import annotations

import math

# The network: Llama 3 70B (examples/llama3_70b.py).
PARAMETERS, LAYERS, HIDDEN, INNER, KEY_VALUE = 70.6e9, 80, 8192, 28672, 1024
BYTES = 2  # bf16, weights and activations

# The search: samples of calibration data, their tokens, probes, schemes of each layer, and the
# allocations that are measured and the refinements of a search as it is by default.
SAMPLES, TOKENS, PROBES, SCHEMES, MEASURED, REFINED = 128, 2048, 2, 6, 20, 4

# The cluster: 8 nodes of 8 H100; a replica of the network is one node.
NODES, GPUS, GPU_BYTES, GPU_FLOPS, GPU_BYTES_PER_S = 8, 8, 80e9, 989e12, 3.35e12
UTILISATION = 0.4  # of the peak, in products of this size
NETWORK_BYTES_PER_S, NETWORK_SHARE, HOST_BYTES_PER_S = 12.5e9, 0.5, 25e9  # 100 Gbit/s; PCIe
QUANTIZE_BYTES = 20  # read and written for each weight and scheme: codes, scales, result
DOLLARS_PER_GPU_HOUR = 3.0
START_S = 300.0  # nodes, Ray, imports, compilation: a guess


def main() -> None:
    """Print the numbers of docs/scale.md."""
    gpus = NODES * GPUS
    weights = PARAMETERS * BYTES
    flops = gpus * GPU_FLOPS * UTILISATION
    pass_flops = 2 * PARAMETERS * TOKENS  # one sample, forward or backward to activations
    inputs = 3 * HIDDEN + INNER  # kept for each token of a layer: q/k/v, o and gate/up; down
    outputs = 3 * HIDDEN + 2 * KEY_VALUE + 2 * INNER  # q, o, down; k, v; gate, up
    kept = (inputs + PROBES * outputs) * LAYERS * TOKENS * BYTES
    graph = 34 * HIDDEN * LAYERS * TOKENS  # what autograd keeps, bytes (Korthikanti et al. 2022)
    per_gpu = (weights + kept + graph) / GPUS
    hops = math.ceil(math.log2(NODES))
    send_s = hops * weights / (NETWORK_BYTES_PER_S * NETWORK_SHARE)
    load_s = weights / GPUS / HOST_BYTES_PER_S
    scored = pass_flops * SAMPLES * (1 + PROBES + SCHEMES)
    quantized_s = PARAMETERS * SCHEMES * QUANTIZE_BYTES / (GPUS * GPU_BYTES_PER_S)
    score_s = scored / flops + quantized_s * math.ceil(SAMPLES / NODES)
    measure_s = pass_flops * SAMPLES * MEASURED / flops
    refine_s = REFINED * (score_s + 2 * pass_flops * SAMPLES / flops)
    total_s = START_S + send_s + load_s + score_s + measure_s + refine_s
    dollars = gpus * total_s / 3600 * DOLLARS_PER_GPU_HOUR
    cells = LAYERS * 4 * SCHEMES  # q/k/v and gate/up are one unit each
    answers = cells * PROBES * 4 * SAMPLES
    rows = {
        "weights, bf16": f"{weights / 1e9:.1f} GB",
        "sent over the network (one copy a node)": f"{weights * NODES / 1e12:.2f} TB",
        "sending, in a tree of 3 hops at half of 100 Gbit/s": f"{send_s:.0f} s",
        "to the GPUs of a node": f"{load_s:.1f} s",
        "memory of a node's object store": f"{weights / 1e9:.0f} GB",
        "memory of a GPU: weights": f"{weights / GPUS / 1e9:.1f} GB",
        "memory of a GPU: inputs and gradients of all layers": f"{kept / GPUS / 1e9:.1f} GB",
        "memory of a GPU: the graph of autograd": f"{graph / GPUS / 1e9:.1f} GB",
        "memory of a GPU, together": f"{per_gpu / 1e9:.0f} of {GPU_BYTES / 1e9:.0f} GB",
        "operations of scoring": f"{scored:.2g}",
        "scoring": f"{score_s:.0f} s",
        "measuring 20 allocations": f"{measure_s:.0f} s",
        "4 refinements": f"{refine_s:.0f} s",
        "results that come back from scoring": f"{answers / 1e6:.1f} MB",
        "all, with 300 s to start": f"{total_s / 60:.0f} minutes",
        "price at 3 dollars for a GPU and hour": f"{dollars:.0f} dollars",
    }
    for what, value in rows.items():
        print(f"{what:52s} {value}")
    core_flops = 30e9  # fp32, one core of a server
    hours = scored / core_flops / 3600
    activations = 2 * (kept + graph) / 1e9  # fp32
    print(
        f"\non processors, fp32: {hours:,.0f} core hours to score; each worker {activations:.0f} GB"
    )


if __name__ == "__main__":
    main()
