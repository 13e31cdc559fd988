"""vLLM's way to an A3 folder: `vllm serve FOLDER`, `LLM(FOLDER).chat(...)`, and the decoder alone fed with embeddings.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. Nothing here is
imported unless vLLM, or our engine on it, is used; only `model` and `processing` import vLLM.

    vllm serve FOLDER                                                      pixels and text in one engine
    vllm serve FOLDER --enable-mm-embeds --limit-mm-per-prompt '{"image": 0}'   no tower; embeddings (V, H) with their grid

Out of vLLM's reach, since it renders the chat template and then tokenizes the result: what a user writes can spell
control tokens there, unlike in our own server.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from artemis_vlm.version import __version__

logger = logging.getLogger(__name__)

GROUP: Final = "vllm.general_plugins"
NAME: Final = "artemis_vlm"
ARCHITECTURE: Final = "ArtemisVLMForConditionalGeneration"


def register() -> None:
    """The entry point. Cheap, and safe to call again; the model's own module waits until vLLM wants it."""
    from transformers import AutoProcessor
    from vllm import ModelRegistry

    import artemis_vlm  # registers the configuration
    from artemis_vlm.vllm_plugin.processing import ArtemisVLMProcessor

    AutoProcessor.register(artemis_vlm.ArtemisVLMConfig, ArtemisVLMProcessor, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"artemis_vlm.vllm_plugin.model:{ARCHITECTURE}")


def announce() -> None:
    """Makes sure that the processes which vLLM starts find `register`, also where this package is not installed.

    A package that runs from a folder on the path, as in a Ray job's working directory, has no entry points. vLLM's
    processes inherit the environment, so a folder with nothing but the entry point is put on their path.
    """
    if any(point.name == NAME for point in entry_points(group=GROUP)):
        return
    folder = Path(tempfile.mkdtemp(prefix="artemis-vllm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    info = folder / f"artemis_vlm_plugin-{__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: artemis-vlm-plugin\nVersion: {__version__}\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{NAME} = {__name__}:register\n")
    here = str(Path(__file__).resolve().parents[2])
    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), here, *([old] if old else [])])
    sys.path.append(str(folder))
    logger.info("artemis-vlm is not installed: vLLM finds its plugin through %s", folder)
