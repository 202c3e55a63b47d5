"""What a number was measured with: the versions of packages, and the device."""

import importlib.metadata
import platform
from importlib.util import find_spec
from pathlib import Path

import torch

MATTERING = (
    "ironmoe",
    "torch",
    "numpy",
    "einops",
    "triton",
    "safetensors",
    "matplotlib",
    "transformers",
)


def versions(packages: tuple[str, ...] = MATTERING) -> dict[str, str]:
    """The versions of Python and of the packages that can change a number; "not installed" where
    one is not."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe_device(device: torch.device) -> str:
    """The device in words, as reports name it."""
    if device.type == "cuda":
        return (
            f"{torch.cuda.get_device_name(device)}, "
            f"{'Triton kernels' if find_spec('triton') else 'torch code: no Triton'}"
        )
    threads = torch.get_num_threads()
    return (
        f"{platform.processor() or platform.machine()} CPU, {threads} thread{'s' * (threads != 1)}"
    )


def processor() -> str:
    """The name of the processor, as Linux knows it; elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
