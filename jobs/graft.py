#!/usr/bin/env python3
"""Assemble a model from a vision tower and a decoder, or prove that one still holds them byte for byte.

`python jobs/graft.py build --vision X --text Y --output Z`, `python jobs/graft.py verify Z [--against X Y]`. X, Y and Z
are folders or `s3://` URIs; X, Y and the Z to verify may be hub ids.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from artemis_vlm import graft
from artemis_vlm.errors import RunError, exit_code
from pipelines.storage import RunFolder, fetch_model


def build(
    vision: str,
    text: str,
    output: str,
    projector: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> None:
    """Copy tower and decoder into a new model folder, with a projector and a manifest.

    Args:
        vision: a Qwen3-VL model, of which only the tower is read, or any folder with such a tower.
        text: a causal decoder with a tokenizer of the A-series layout; tokenizer, chat template and generation
            configuration are copied unchanged.
        output: where the model goes; must not hold one.
        projector: a folder with a trained projector, whose images the model takes too; without it, an untrained one and
            the tower's images.
        min_pixels: area of the smallest image, after resizing; without it, the projector's or the tower's own.
        max_pixels: area of the largest.
    """
    sources = _sources(vision, text)
    trained = fetch_model(projector, (graft.PROJECTOR_FILE, "config.json")).path if projector else None
    spec = graft.source_spec(sources, min_pixels, max_pixels, trained)
    weights = graft.read_projector(trained) if trained else graft.new_projector(sources)
    target = RunFolder(output)
    if target.pull("config.json"):
        raise RunError(f"{output} already holds a model; give another output or remove it")
    digest = graft.write_model(target.path, sources, weights, spec)
    target.publish(".", last="config.json")  # a folder with it is whole
    target.discard()
    print(f"{output}: {len(sources.tensors())} frozen tensors, manifest sha256 {digest}")


def verify(folder: tyro.conf.Positional[str], against: tuple[str, str] | None = None) -> None:
    """Compare every frozen tensor with the folder's manifest, and the manifest with the sources.

    Args:
        folder: a model that was built here.
        against: the vision and the text model that it was built from.
    """
    found = fetch_model(folder)
    problems = graft.verify(found.path, None if against is None else _sources(*against))
    if problems:
        rest = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RunError(f"{folder} is not what was grafted: {problems[0]}{rest}")
    print(
        f"{folder}: every frozen tensor is byte for byte what the manifest{' and the sources say' if against else ' says'}"
    )


def _sources(vision: str, text: str) -> graft.Sources:
    tower, decoder = fetch_model(vision), fetch_model(text)
    return graft.Sources(tower.path, decoder.path, tower.origin, decoder.origin)


def main(arguments: list[str]) -> int:
    commands = {"build": build, "verify": verify}
    return exit_code(
        lambda: tyro.extras.subcommand_cli_from_dict(commands, prog="graft.py", description=__doc__, args=arguments)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
