"""Machines that need not be here: peak rates, memory and launch overhead, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpq.core.errors import unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a roofline needs to know of a machine.

    `peaks` are dense operations per second (a multiply-accumulate is two) by the format that is
    multiplied; a format that is not there has no arithmetic of its own. `bandwidth` is bytes per
    second of the memory of `memory_bytes` that weights are read from, `launch_s` the overhead of
    a kernel, which no data sheet has: an assumption in every preset. Some machines leave memory
    to an operating system too: `memory_bytes` is all there is.
    """

    name: str
    title: str
    peaks: Mapping[str, float]
    bandwidth: float
    memory_bytes: int
    launch_s: float
    source: str


_GB = 10**9
# Assumptions: a kernel of a captured graph on a GPU, a parallel region of a CPU, a command or a
# graph node of an accelerator behind a driver.
_GPU_LAUNCH_S = 3e-6
_CPU_LAUNCH_S = 5e-6
_DRIVER_LAUNCH_S = 10e-6

MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine(
            name="H100",
            title="NVIDIA H100 SXM5 80 GB",
            # Half of the data sheet's tensor rates, which are with sparsity. Hopper dropped int4.
            peaks={
                "fp32": 67e12,
                "tf32": 494.7e12,
                "bf16": 989.4e12,
                "fp16": 989.4e12,
                "fp8": 1978.9e12,
                "int8": 1978.9e12,
            },
            bandwidth=3.35e12,
            memory_bytes=80 * _GB,
            launch_s=_GPU_LAUNCH_S,
            source="NVIDIA H100 Tensor Core GPU data sheet; Hopper architecture white paper, 2022",
        ),
        Machine(
            name="A100",
            title="NVIDIA A100 SXM4 80 GB",
            peaks={
                "fp32": 19.5e12,
                "tf32": 156e12,
                "bf16": 312e12,
                "fp16": 312e12,
                "int8": 624e12,
                "int4": 1248e12,
            },
            bandwidth=2.039e12,
            memory_bytes=80 * _GB,
            launch_s=_GPU_LAUNCH_S,
            source="NVIDIA A100 80GB data sheet; Ampere GA100 architecture white paper, 2020",
        ),
        Machine(
            name="L4",
            title="NVIDIA L4 24 GB",
            # Half of the data sheet's rates, which are with sparsity. It is silent about int4:
            # twice int8, as the Ada white paper has it for the other chips of the family.
            peaks={
                "fp32": 30.3e12,
                "tf32": 60e12,
                "bf16": 121e12,
                "fp16": 121e12,
                "fp8": 242.5e12,
                "int8": 242.5e12,
                "int4": 485e12,
            },
            bandwidth=300e9,
            memory_bytes=24 * _GB,
            launch_s=_GPU_LAUNCH_S,
            source="NVIDIA L4 Tensor Core GPU data sheet, 2023",
        ),
        Machine(
            name="T4",
            title="NVIDIA T4 16 GB",
            # Turing has neither bf16 nor tf32.
            peaks={"fp32": 8.1e12, "fp16": 65e12, "int8": 130e12, "int4": 260e12},
            bandwidth=320e9,
            memory_bytes=16 * _GB,
            launch_s=_GPU_LAUNCH_S,
            source="NVIDIA T4 Tensor Core GPU data sheet, 2019",
        ),
        Machine(
            name="RTX4090",
            title="NVIDIA GeForce RTX 4090 24 GB",
            # Tensor rates with fp32 accumulation: half of those with fp16 accumulation.
            peaks={
                "fp32": 82.6e12,
                "tf32": 82.6e12,
                "bf16": 165.2e12,
                "fp16": 165.2e12,
                "fp8": 330.3e12,
                "int8": 660.6e12,
                "int4": 1321.2e12,
            },
            bandwidth=1008e9,
            memory_bytes=24 * _GB,
            launch_s=_GPU_LAUNCH_S,
            source="NVIDIA Ada GPU architecture white paper, 2022, appendix A",
        ),
        Machine(
            name="Orin",
            title="NVIDIA Jetson AGX Orin 64 GB, GPU alone",
            # The brief gives 5.3 TFLOPS of fp32 and 170 sparse int8 TOPS: dense half of it, fp16
            # half of int8, int4 twice int8, tf32 a quarter of int8, as in GA100.
            peaks={
                "fp32": 5.3e12,
                "tf32": 21.25e12,
                "bf16": 42.5e12,
                "fp16": 42.5e12,
                "int8": 85e12,
                "int4": 170e12,
            },
            bandwidth=204.8e9,
            memory_bytes=64 * _GB,
            launch_s=_DRIVER_LAUNCH_S,
            source="NVIDIA Jetson AGX Orin Series technical brief v1.2, 2022",
        ),
        Machine(
            name="M3Max",
            title="Apple M3 Max, 40-core GPU, 128 GB",
            # Apple publishes the bandwidth alone. 40 cores of 128 lanes, 2 operations at the
            # 1.39 GHz that tools report; 16-bit arithmetic is taken to run at the same rate.
            peaks={"fp32": 14.2e12, "bf16": 14.2e12, "fp16": 14.2e12},
            bandwidth=400e9,
            memory_bytes=128 * _GB,
            launch_s=_DRIVER_LAUNCH_S,
            source="Apple, MacBook Pro (16-inch, Nov 2023) technical specifications; rates derived",
        ),
        Machine(
            name="RaspberryPi5",
            title="Raspberry Pi 5 8 GB, four Cortex-A76 cores at 2.4 GHz",
            # Two 128-bit pipes a core: 4 fp32, 8 fp16 or 16 int8 (SDOT) multiply-accumulates
            # each. LPDDR4X-4267, 32 bits wide. No bf16: Armv8.2.
            peaks={"fp32": 153.6e9, "fp16": 307.2e9, "int8": 614.4e9},
            bandwidth=17.1e9,
            memory_bytes=8 * _GB,
            launch_s=_CPU_LAUNCH_S,
            source="Raspberry Pi 5 product brief; Arm Cortex-A76 Software Optimization Guide",
        ),
        Machine(
            name="SnapdragonXElite",
            title="Qualcomm Snapdragon X Elite 64 GB: int8 on the NPU, floating point on the GPU",
            # fp16 at twice the fp32 rate of the GPU is an assumption.
            peaks={"fp32": 4.6e12, "fp16": 9.2e12, "int8": 45e12},
            bandwidth=135e9,
            memory_bytes=64 * _GB,
            launch_s=_DRIVER_LAUNCH_S,
            source="Qualcomm Snapdragon X Elite product brief, 2023",
        ),
    )
}


def get_machine(name: str) -> Machine:
    """Return the preset of that name; raises InvalidInputError with the nearest one."""
    if name not in MACHINES:
        raise unknown("machine", name, MACHINES)
    return MACHINES[name]
