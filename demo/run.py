"""`make demo`: builds the embedded parts, starts a Ray of its own, submits the training job, says what to try next."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from artemis_vlm.errors import exit_code
from demo import assets
from pipelines.local import local_cluster

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "runs" / "demo"


def submit(job: list[str], log: Path) -> int:
    """`ray job submit` on a Ray that is started for it; returns the exit code."""
    print(f"starting Ray, then: ray job submit --working-dir . -- {' '.join(job)}", flush=True)
    with local_cluster(log, num_cpus=max(4, os.cpu_count() or 1)) as cluster:
        command = ["ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", str(ROOT), "--", *job]
        quiet = {"RAY_LOGGER_LEVEL": "error"}  # else it names every file that it does not upload
        return subprocess.run(command, env={**cluster.env, **quiet}, cwd=ROOT).returncode


def main() -> int:
    started = time.monotonic()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    print("building the embedded tokenizer, decoder and images (once; then from the cache)", flush=True)
    for part in (assets.decoder, assets.tower, lambda: assets.shards("train"), lambda: assets.shards("heldout")):
        part()
    code = submit(["python", "jobs/train_a3.py", "demo", "--output", str(OUTPUT)], OUTPUT / "ray.log")
    if code == 0:
        print(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes. Next:")
        print(f"  open {OUTPUT / 'report.html'} in a browser")
        print(f"  {Path(sys.executable)} -m demo.compare {OUTPUT / 'a3'}   # minutes: does it look at the image?")
    return code


if __name__ == "__main__":
    sys.exit(exit_code(main))
