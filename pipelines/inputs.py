"""What a run reads: tower, decoder, prompt and data, found and checked before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from artemis_vlm import chat, graft
from artemis_vlm.errors import RunError
from artemis_vlm.image import ImageSpec
from pipelines.data import Encoder, Source, find_source
from pipelines.recipe import TrainConfig
from pipelines.shards import Shard, check_same_data, find_shards, identity
from pipelines.storage import fetch_model, is_hub_id, is_remote, local_path


@dataclass(frozen=True)
class Parts:
    """The models that a configuration names, on this machine: no weights loaded yet."""

    sources: graft.Sources
    spec: ImageSpec
    tokenizer: PreTrainedTokenizerBase
    frame: chat.CaptionFrame

    def encoder(self, config: TrainConfig) -> Encoder:
        return Encoder(self.spec, self.tokenizer, self.frame, config.max_tokens)


def anchored(config: TrainConfig) -> TrainConfig:
    """The configuration with its local places absolute: Ray Train gives every rank a folder of its own to work in."""
    reads = [name for name in ("tower", "decoder", "data", "eval_data") if not is_hub_id(getattr(config, name))]
    given = {name: place for name in (*reads, "output") if (place := getattr(config, name)) and not is_remote(place)}
    places: dict[str, Any] = {name: str(local_path(place)) for name, place in given.items()}
    return replace(config, **places)


def find_parts(config: TrainConfig) -> Parts:
    """Fetches tower and decoder and checks that they fit.

    Raises:
        ArtemisError: something is missing, damaged or does not fit; the text says what.
    """
    for name in ("tower", "decoder", "data", "output"):
        if not getattr(config, name):
            raise RunError(f"the run has no {name}; give --{name} (a folder, an s3:// URI or a hub id)")
    tower, decoder = fetch_model(config.tower), fetch_model(config.decoder)
    sources = graft.Sources(tower.path, decoder.path, tower.origin, decoder.origin)
    spec = graft.source_spec(sources, config.min_pixels, config.max_pixels)
    a3 = graft.graft_config(sources)
    graft.check_whole(a3, sources.tensors(), projector=False)
    thinking = chat.image_thinking(True, a3.image_turn_thinking)
    frame = chat.CaptionFrame.build(sources.tokenizer, config.prompt, thinking)
    return Parts(sources, spec, sources.tokenizer, frame)


@dataclass(frozen=True)
class Data:
    """The data that a configuration names: found once a run, so that every restart has the same.

    evaluated: shards whose first samples are the held-out set
    """

    source: Source
    evaluated: Sequence[Shard]

    def identity(self) -> dict[str, Any]:
        """What must be the same for the run to continue, as JSON."""
        return {"data": identity(self.source.shards), "eval_data": identity(self.evaluated)}


def find_data(config: TrainConfig, began_with: Mapping[str, Any] | None) -> Data:
    """Finds training and evaluation data.

    Args:
        began_with: of the run to continue: its `Data.identity()`, and as `held_out` its rows held out of each shard.

    Raises:
        RunError: there is none, or other data than the run began with.
    """
    known = began_with["held_out"] if began_with else None
    source = find_source(config.data, config.seed, 0 if config.eval_data else config.held_out, known)
    data = Data(source, find_shards(config.eval_data) if config.eval_data else source.shards)
    if began_with:
        ours = data.identity()
        check_same_data(config.data, began_with["data"], ours["data"])
        check_same_data(config.eval_data or config.data, began_with["eval_data"], ours["eval_data"])
    return data
