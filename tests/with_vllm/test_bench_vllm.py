"""The benchmark on vLLM runs to its end on tiny shapes, in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_every_figure_is_there(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "jobs/bench.py", "vllm", "--shapes", "tiny", "--json", str(file)]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(file.read_text())
    rows = {(row["part"], row["what"]): row for row in found["rows"]}
    for what in ("decode 1", "decode 4", "ttft", "tower", "captions"):
        assert rows["separate", what]["of_vllm_alone"] > 0, what
        assert ("mono", what) in rows
    assert rows["separate", "captions"]["images_per_s"] > 0
    assert found["failures"] == []
