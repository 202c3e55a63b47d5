"""The versions of the packages that can change a number."""

import importlib.metadata
import platform

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
