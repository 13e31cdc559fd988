"""The demo's big parts, built once per machine in the user's cache folder and found there ever after."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from artemis_vlm import graft
from artemis_vlm.image import PREPROCESSOR_FILE, ImageSpec
from artemis_vlm.version import __version__
from demo import decoder as decoder_module
from demo import scenes
from demo import tokenizer as tokenizer_module
from pipelines.recipe import TrainConfig
from pipelines.storage import cache_folder

#: The vision tower, in the repo.
TOWER_FILES: Final = Path(__file__).parent / "tower"
#: The projector that `python -m demo.train_projector` trained, in the repo.
PROJECTOR_FILES: Final = Path(__file__).parent / "projector"
#: Scenes in each split of the demo's data; one pass of training sees a part.
COUNTS: Final = {"train": 800, "heldout": 96, "ood": 96}


def cached(name: str, inputs: Sequence[bytes | str | Path], build: Callable[[Path], object]) -> Path:
    """The folder that `build(folder)` fills, built only if no folder of this name and these inputs exists.

    `inputs` is all that determines the content: a Path counts by the bytes of its file, so a builder names its own
    source. The folder appears whole or not at all: it is built aside and renamed. Two processes that want it at once
    wait for one build, by a file lock that ends with its process.
    """
    key = hashlib.sha256()
    for item in inputs:
        data = item.read_bytes() if isinstance(item, Path) else item.encode() if isinstance(item, str) else item
        key.update(len(data).to_bytes(8, "big") + data)
    root = cache_folder()
    target = root / f"{name}-{key.hexdigest()[:16]}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            with TemporaryDirectory(dir=root, prefix=f".{name}-") as aside:
                built = Path(aside) / name
                built.mkdir()
                build(built)
                built.rename(target)
    return target


def tokenizer() -> Path:
    """Folder of the A-series tokenizer: 3 s to build, 17 MB."""
    vocabulary = tokenizer_module.tekken_file()
    inputs: list[str | Path] = [
        vocabulary,
        tokenizer_module.TEMPLATE,
        Path(tokenizer_module.__file__),
        version("transformers"),
    ]
    return cached("tokenizer", inputs, tokenizer_module.build_tokenizer)


def decoder() -> Path:
    """Folder of the decoder with that tokenizer: 20 s to build, 532 MB."""
    words = tokenizer()
    weights = decoder_module.smollm2_file()
    inputs: list[str | Path] = [words.name, weights, Path(decoder_module.__file__), version("transformers"), version("gguf")]
    return cached("decoder", inputs, lambda folder: decoder_module.build_decoder(words, folder))


def tower() -> Path:
    """Folder of the vision tower: a copy, since Ray gives the repo another path with every change in it."""
    files = sorted(TOWER_FILES.iterdir())
    return cached("tower", files, lambda folder: shutil.copytree(TOWER_FILES, folder, dirs_exist_ok=True))


def model() -> Path:
    """Folder `a3` of a whole model with the projector that the repo ships, which an H100 trained on all names: 550 MB."""
    sources = graft.Sources(tower(), decoder())
    projector = PROJECTOR_FILES / graft.PROJECTOR_FILE
    inputs = [sources.tower.name, sources.decoder.name, projector, PROJECTOR_FILES / PREPROCESSOR_FILE, __version__]
    return cached("shipped", inputs, lambda folder: _graft(sources, folder / "a3")) / "a3"


def _graft(sources: graft.Sources, folder: Path) -> None:
    graft.write_model(folder, sources, graft.read_projector(PROJECTOR_FILES), ImageSpec.load(PROJECTOR_FILES))


def shards(split: str) -> Path:
    """Folder of captioned scenes with the demo's 32 names, as BLIP3o-style shards: about 15 s a thousand to build."""
    inputs = [Path(scenes.__file__), *sorted(p for p in scenes.ART.iterdir() if p.is_file()), split, str(COUNTS[split])]
    return cached(f"scenes-{split}", inputs, lambda folder: _write_scenes(folder, split))


def _write_scenes(folder: Path, split: str) -> None:
    scenes.write_shards(folder, split=split, names=scenes.DEMO_NAMES, count=COUNTS[split], rows_per_shard=200)


def fill_in(config: TrainConfig) -> TrainConfig:
    """The embedded parts wherever a configuration names none; builds what is not in the cache yet."""
    return replace(
        config,
        tower=config.tower or str(tower()),
        decoder=config.decoder or str(decoder()),
        data=config.data or str(shards("train")),
        eval_data=config.eval_data or ("" if config.data else str(shards("heldout"))),
        output=config.output or str(Path("runs/demo").absolute()),
    )


if __name__ == "__main__":  # `make serve` asks where its model is
    print(model())
