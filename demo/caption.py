"""`make caption`: captions the embedded held-out images on a Ray of its own, with MODEL or the model that ships."""

from __future__ import annotations

import sys
import time

from artemis_vlm.errors import exit_code
from demo import assets
from demo.run import ROOT, submit

CAPTIONS = ROOT / "runs" / "caption"


def main() -> int:
    started = time.monotonic()
    model = sys.argv[1] if len(sys.argv) > 1 else str(assets.model())
    CAPTIONS.mkdir(parents=True, exist_ok=True)
    job = ["python", "jobs/caption.py", "--model", model, "--input", str(assets.shards("heldout"))]
    job += ["--output", str(CAPTIONS / "heldout"), "--max-tokens", "96", "--part-rows", "32"]
    code = submit(job, CAPTIONS / "ray.log")
    if code == 0:
        print(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes; open {CAPTIONS / 'heldout' / '_report.html'}")
    return code


if __name__ == "__main__":
    sys.exit(exit_code(main))
