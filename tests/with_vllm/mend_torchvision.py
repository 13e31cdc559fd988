"""Makes PyPI's torchvision importable beside a CPU-only torch, in the environment this runs in.

Its compiled operators want CUDA and do not load there; two of them are looked up by name while it is imported. The
schemas are enough: vLLM's Qwen-VL models import its transforms, and no test here calls an operator.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

SCHEMAS = """\
import torch

_schemas = torch.library.Library("torchvision", "FRAGMENT")
_schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

package = find_spec("torchvision")
assert package is not None
assert package.origin is not None
file = Path(package.origin).parent / "_meta_registrations.py"
text = file.read_text()
if not text.startswith(SCHEMAS):
    file.write_text(SCHEMAS + text)
