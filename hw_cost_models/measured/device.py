"""What a time depends on: the machine, its instruction set and the libraries."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path

MEASUREMENT_VERSION = 1  # raise it when the same kernel would get another time


def _cpu() -> tuple[str, str]:
    model, flags = platform.processor() or "unknown CPU", ""
    source = Path("/proc/cpuinfo")
    if source.exists():
        for line in source.read_text().splitlines():
            key, _, value = line.partition(":")
            match key.strip():
                case "model name" | "CPU part":
                    model = value.strip()
                case "flags" | "Features":
                    flags = value
    digest = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:8]
    return model, digest


def device_fingerprint(num_threads: int = 1, library: str = "onnxruntime", engine: str = "") -> str:
    """Return a text that differs where kernel times may differ.

    CPU model, digest of its instruction-set flags, operating system, library with version
    and engine where it has several, thread count and the version of the measurement itself.
    """
    model, digest = _cpu()
    version = importlib.metadata.version(library) + (f" engine {engine}" if engine else "")
    threads = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
    return (
        f"{model} ({platform.machine()}, isa {digest}), {platform.system()}, "
        f"{library} {version}, {threads}, measurement v{MEASUREMENT_VERSION}"
    )
