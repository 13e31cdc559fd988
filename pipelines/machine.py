"""What a run or a figure is made on: whether it is there, and what its record says of it."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from artemis_vlm.errors import RunError

PACKAGES: Final = ("artemis-vlm", "torch", "transformers", "ray", "pillow", "numpy")


def check_device(device: str, here: bool = True) -> None:
    """Raises RunError where torch does not know a device, or if it is to be `here`, does not find it."""
    try:
        wanted = torch.device(device)
        there = torch.get_device_module(wanted).device_count()
    except (RuntimeError, AttributeError) as error:
        raise RunError(f"device is {device}; expected cpu or cuda") from error
    if here and (wanted.index or 0) >= there:
        raise RunError(f"device is {device}, of which torch finds {there} on this machine; give another, such as cpu")


def machine(device: torch.device | str, **more: Any) -> dict[str, Any]:
    """JSON: the device by name, the versions of what computes, and `more`."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a folder, or without Ray
            continue
    return {"device": name, "versions": versions, **more}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.processor() or platform.machine()}"
