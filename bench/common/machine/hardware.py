"""The machine that a number was measured on: processor, cores, threads, memory and GPU."""

import os
import platform
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

GIGABYTE = 1e9


def hardware() -> dict[str, Any]:
    """The machine as reports and bench files keep it.

    processor: its name; instructions: the widest that torch uses, such as "AVX512"; bfloat16:
    whether the processor multiplies in it; cores: that this process may use; threads: of torch;
    memory_gb: of the machine; gpus: their names.
    """
    return {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": multiplies_bfloat16(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": memory_gb(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_device(device: torch.device) -> str:
    """The device in words, as reports name it."""
    if device.type == "cuda":
        return (
            f"{torch.cuda.get_device_name(device)}, "
            f"{'Triton kernels' if find_spec('triton') else 'torch code: no Triton'}"
        )
    threads = torch.get_num_threads()
    memory = memory_gb()
    amount = "" if memory is None else f", {memory:.0f} GB"
    return f"{processor()}, {cores()} cores, {threads} thread{'s' * (threads != 1)}{amount}"


def processor() -> str:
    """The name of the processor, as Linux or macOS know it; elsewhere as Python does."""
    names = _cpuinfo("model name")
    if names:
        return names[0]
    if platform.system() == "Darwin":
        try:
            return subprocess.run(
                ["sysctl", "-n", "machdep.cpu.brand_string"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return platform.processor() or platform.machine()


def multiplies_bfloat16() -> bool | None:
    """Whether the processor has products of bfloat16; None where this system does not say it."""
    flags = " ".join(_cpuinfo("flags")[:1] or _cpuinfo("Features")[:1]).split()
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16")) if flags else None


def cores() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gb() -> float | None:
    """The memory of the machine in 10⁹ bytes; None where this system does not say it."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return round(size / GIGABYTE, 1)


def _cpuinfo(key: str) -> list[str]:
    """What Linux says under this key, for each of its processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    named = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in named if name.strip() == key]
