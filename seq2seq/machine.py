"""What a figure or a run depends on beside the code: the machine, and the versions of packages."""

import importlib.metadata
import os
import platform


def machine() -> dict[str, str | int]:
    """The platform, and the cores that this process may use."""
    return {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0))}


def versions(*packages: str) -> dict[str, str]:
    """Of installed packages, by name."""
    return {name: importlib.metadata.version(name) for name in packages}
