"""`make caption`: captions the embedded held-out images with the demo's A3, on a Ray of its own."""

from __future__ import annotations

import sys
import time

from artemis_vlm.errors import RunError, exit_code
from demo import assets
from demo.run import OUTPUT, ROOT, submit

MODEL = OUTPUT / "a3"
CAPTIONS = ROOT / "runs" / "caption"


def main() -> int:
    started = time.monotonic()
    if not (MODEL / "config.json").exists():
        raise RunError(f"{MODEL} holds no model; run `make demo` first, which trains it")
    CAPTIONS.mkdir(parents=True, exist_ok=True)
    job = ["python", "jobs/caption.py", "--model", str(MODEL), "--input", str(assets.shards("heldout"))]
    job += ["--output", str(CAPTIONS / "heldout"), "--max-tokens", "96", "--part-rows", "32"]
    code = submit(job, CAPTIONS / "ray.log")
    if code == 0:
        print(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes; open {CAPTIONS / 'heldout' / '_report.html'}")
    return code


if __name__ == "__main__":
    sys.exit(exit_code(main))
