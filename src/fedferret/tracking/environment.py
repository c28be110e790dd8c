"""``environment.json``: the machine and the package versions of a run, for reproducing its results."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from fedferret.core.files import write_atomically

FILE = "environment.json"
PACKAGES = (
    "fedferret",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "flwr-datasets",
    "tokenizers",
    "safetensors",
    "numpy",
)


def environment() -> dict[str, Any]:
    """Describe what this process runs on.

    Returns:
        Python, platform, processor, cores available to this process, memory in bytes, accelerator, package versions.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerator": _accelerator(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def write_environment(folder: Path) -> Path:
    """Write ``environment.json``.

    Args:
        folder: of a run.

    Returns:
        The file's path.
    """
    write_atomically(folder / FILE, json.dumps(environment(), indent=2) + "\n")
    return folder / FILE


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    information = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _accelerator() -> str:
    torch = sys.modules.get("torch")  # a run has imported torch; other commands must not pay seconds for the import
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return "none"
