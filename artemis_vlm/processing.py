"""The Hugging Face face of `image` and `chat`: a processor and a training collator, for users of the model package."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # under this name whichever client it is
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import MultiModalData, ProcessingKwargs, TextKwargs
from transformers.utils import cached_file

from artemis_vlm import chat
from artemis_vlm.configuration import ArtemisVLMConfig
from artemis_vlm.errors import CheckpointError, SampleError
from artemis_vlm.image import CLIP_MEAN, CLIP_STD, PREPROCESSOR_FILE, ImageSpec, check_aspect_ratio, json_object, upright_rgb

logger = logging.getLogger(__name__)

VIDEO_TOKEN: Final = "<|video_pad|>"
PROCESSOR_FILE: Final = "processor_config.json"
#: What a processor's call takes and a template does not.
_CALL_OPTIONS: Final = frozenset(
    option
    for kind in (ProcessingKwargs, TextKwargs, Qwen2VLImageProcessorPil.valid_kwargs)
    for option in kind.__annotations__
)
_HUB_OPTIONS: Final = ("revision", "token", "cache_dir", "local_files_only", "force_download")


class ArtemisVLMProcessor(ProcessorMixin):  # type: ignore[misc]
    """Text and images to model inputs, with the preprocessing that the checkpoint was aligned on.

    Two ways to make one: `from_pretrained(folder)`, and the model card's
    `ArtemisVLMProcessor(tokenizer=..., vision_config=...)`, which looks beside the tokenizer for the checkpoint's
    `preprocessor_config.json` and takes CLIP's mean/std, with a warning, where there is none.

    Called with `images` (PIL images, arrays of 0..255, paths, http(s) or data URIs; one, a list, or a list for each text)
    and `text` (rendered, one `<|image_pad|>` an image, each expanded to the image's tokens), it gives `input_ids`,
    `attention_mask`, and with images `pixel_values` float32 (P, 1536) and `image_grid_thw` int64 (I, 3).

    The text path renders a template and then tokenizes it, as Transformers users expect: for trusted input. What
    strangers write goes through `artemis_vlm.chat`.

    Args:
        tokenizer: a fast tokenizer with `<|image_pad|>`.
        vision_config: the tower's configuration; its patch and merge sizes must be the spec's.
        min_pixels, max_pixels: areas in pixels; None keeps the checkpoint's.
        image_processor: made from the spec unless given.
        image_turn_thinking: whether image turns open a think block when the caller does not say; None: the checkpoint's.
        max_images_per_turn: more in one turn are refused; None: the checkpoint's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vision_config: Any = None,
        image_token: str = chat.IMAGE_TOKEN,
        video_token: str = VIDEO_TOKEN,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        image_processor: Qwen2VLImageProcessorPil | None = None,
        image_turn_thinking: bool | None = None,
        max_images_per_turn: int | None = None,
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        if image_processor is None:
            image_processor = image_processor_of(find_image_spec(tokenizer.name_or_path, vision_config))
        if min_pixels is not None or max_pixels is not None:
            spec = ImageSpec.from_dict(image_processor.to_dict())
            image_processor = image_processor_of(spec.with_limits(min_pixels, max_pixels))
        super().__init__(tokenizer, image_processor, chat_template=chat_template or tokenizer.chat_template)
        self.image_token, self.video_token = image_token, video_token
        self.image_token_id = chat.image_token_id(tokenizer)
        self.video_token_id = tokenizer.get_vocab().get(video_token)
        self.merge_length = image_processor.merge_size**2
        habits = {"image_turn_thinking": image_turn_thinking, "max_images_per_turn": max_images_per_turn}
        if None in habits.values():
            saved = find_habits(tokenizer.name_or_path)
            habits = {name: saved[name] if value is None else value for name, value in habits.items()}
        self.image_turn_thinking = bool(habits["image_turn_thinking"])
        self.max_images_per_turn = int(habits["max_images_per_turn"] or 0)

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        return super().__call__(images=images, text=text, **kwargs)

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec.from_dict(self.image_processor.to_dict())

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        hub = {k: kwargs[k] for k in _HUB_OPTIONS if kwargs.get(k)}
        habits = find_habits(str(pretrained_model_name_or_path), **hub)  # first: it says what is wrong with the file
        fields, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        return fields | habits, kwargs

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """The tokenizer and the PIL image processor: Transformers would choose torchvision's, whose pixels differ."""
        hub = {k: kwargs[k] for k in _HUB_OPTIONS if kwargs.get(k)}
        spec = find_image_spec(str(pretrained_model_name_or_path), **hub)
        options = {k: v for k, v in kwargs.items() if k in Qwen2VLImageProcessorPil.valid_kwargs.__annotations__}
        tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs)
        return [tokenizer, image_processor_of(spec, **options)]

    @classmethod
    def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """By name, not by place: the published package has `vision_config` behind the tokenizer."""
        tokenizer, image_processor = args
        return super().from_args_and_dict([tokenizer], processor_dict, **{"image_processor": image_processor} | kwargs)

    def to_dict(self) -> dict[str, Any]:
        """`processor_config.json`: all but the image spec, whose one place is `preprocessor_config.json`."""
        fields: dict[str, Any] = super().to_dict()
        del fields["image_processor"]
        return fields

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Writes the tokenizer's files, `processor_config.json` and `preprocessor_config.json`."""
        files: list[str] = super().save_pretrained(save_directory)
        self.spec.save(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return [*files, str(Path(save_directory) / PREPROCESSOR_FILE)]

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As everywhere in Transformers; image turns get the checkpoint's own default of `enable_thinking`.

        Raises:
            SampleError: more images in a turn than `max_images_per_turn`.
        """
        batched = isinstance(conversation, (list, tuple)) and conversation and isinstance(conversation[0], (list, tuple))
        conversations = conversation if batched else [conversation]
        images = [chat.count_images(turns, self.max_images_per_turn) for turns in conversations]
        defaults = [chat.image_thinking(n > 0, self.image_turn_thinking) for n in images]
        if "enable_thinking" in kwargs or not self._template_thinks(chat_template) or set(defaults) == {None}:
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        if None not in defaults:
            return super().apply_chat_template(conversation, chat_template, enable_thinking=False, **kwargs)
        return self._apply_to_mixed(conversations, chat_template, **kwargs)

    def _apply_to_mixed(self, conversations: Sequence[Any], chat_template: str | None, **kwargs: Any) -> Any:
        """A batch of turns with and without images, each with its own default; one template call takes one for all."""
        tokenize, as_dict = kwargs.pop("tokenize", False), kwargs.pop("return_dict", False)
        options = {**(kwargs.pop("processor_kwargs", None) or {})}
        if tensors := kwargs.pop("return_tensors", None):
            options["return_tensors"] = tensors
        options |= {name: kwargs.pop(name) for name in _CALL_OPTIONS & kwargs.keys()}
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ValueError("return_assistant_tokens_mask needs enable_thinking when only some conversations hold images")
        texts = [self.apply_chat_template(turns, chat_template, **kwargs) for turns in conversations]
        if not tokenize:
            return texts
        bos = self.tokenizer.bos_token
        if bos is not None and texts[0].startswith(bos):
            options["add_special_tokens"] = False
        batch = self(text=texts, images=[_images_of(turns) for turns in conversations], **options)
        return batch if as_dict else batch["input_ids"]

    def _template_thinks(self, chat_template: str | None) -> bool:
        """Whether the template knows `enable_thinking`; one that does not must not be given it."""
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        return "enable_thinking" in str(named.get(chat_template or "default", chat_template))

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
        """Transformers' hook before anything is computed: texts as a list, images loaded and one after the other."""
        if any(kwargs.get(name) is not None for name in ("videos", "audio")):
            raise ValueError("this model takes text and images; it was given videos or audio")
        texts = [text] if isinstance(text, str) else text
        if texts is not None:
            texts = list(texts)
            self._check_counts(texts, images)
        options = {**kwargs, **(kwargs.get("images_kwargs") or {})}
        rescale, factor = (options.get(k, getattr(self.image_processor, k)) for k in ("do_rescale", "rescale_factor"))
        to_one = bool(rescale) and factor < 1
        flat = [_loaded(image, number, to_one) for number, image in enumerate(_flatten(images), 1)]
        return flat or None, texts, None, None

    def _check_counts(self, texts: list[str], images: Any) -> None:
        """Raises SampleError where a text (images given a list a text) or all of them hold another number of images."""
        rows = isinstance(images, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in images)
        for text, row in zip(texts, images if rows and len(images) == len(texts) else ()):
            _check_placeholders(text.count(self.image_token), len(row), self.image_token)
        total = sum(text.count(self.image_token) for text in texts)
        _check_placeholders(total, len(_flatten(images)), self.image_token)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        return str(self.image_token * (patches // self.merge_length))

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Tokens and patches of images of the given (height, width), for engines that plan before they see an image."""
        if image_sizes is None:
            return MultiModalData()
        patches = [self.image_processor.get_number_of_image_patches(*size, kwargs) for size in image_sizes]
        tokens = [n // self.merge_length for n in patches]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=patches)


class ArtemisDataCollator:
    """Chats with images to a right-padded training batch, for any trainer that takes a collator.

    Each feature is `{"images": [PIL images], "messages": [turns]}`; the last turn, the assistant's, is the target. A
    thought in it (`reasoning_content`, or before `</think>` in its text) is trained with the answer; a turn without one
    gets the empty think block in its prompt. With `auto_detect_thinking=False` prompts open as the checkpoint's do when
    the caller does not say. Each image is preprocessed once.

    Returns a dict: `input_ids`, `attention_mask`, `labels` int64 (B, T), labels -100 off the target; with images
    `pixel_values` float32 (P, 1536) and `image_grid_thw` int64 (I, 3).
    """

    def __init__(self, processor: ArtemisVLMProcessor, label_pad: int = -100, auto_detect_thinking: bool = True) -> None:
        self.processor = processor
        self.label_pad = label_pad
        self.auto_detect_thinking = auto_detect_thinking
        tokenizer = processor.tokenizer
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if not features:
            raise SampleError("the batch holds no features; expected at least one with images and messages")
        images = [image for f in features for image in f.get("images") or []]
        batch: dict[str, torch.Tensor] = {}
        if images:
            batch = dict(self.processor(images=images, return_tensors="pt"))
        counts = iter(int(grid.prod()) // self.processor.merge_length for grid in batch.get("image_grid_thw", []))
        rows = [self._encode(f, [next(counts) for _ in f.get("images") or []]) for f in features]
        longest = max(len(ids) for ids, _ in rows)
        batch["input_ids"] = torch.full((len(rows), longest), self.pad_id)
        batch["attention_mask"] = torch.zeros(len(rows), longest, dtype=torch.int64)
        batch["labels"] = torch.full((len(rows), longest), self.label_pad)
        for row, (ids, n_prompt) in enumerate(rows):
            batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][row, : len(ids)] = 1
            batch["labels"][row, n_prompt : len(ids)] = torch.tensor(ids[n_prompt:])
        return batch

    def _encode(self, feature: dict[str, Any], image_tokens: list[int]) -> tuple[list[int], int]:
        messages = feature["messages"]
        if self.auto_detect_thinking:
            thought, _ = chat.target_of(messages)
            thinking: bool | None = bool(thought)
        else:
            thinking = chat.image_thinking(bool(image_tokens), self.processor.image_turn_thinking)
        return chat.encode_example(
            self.processor.tokenizer,
            messages,
            image_tokens=image_tokens,
            enable_thinking=thinking,
            max_images_per_turn=self.processor.max_images_per_turn,
        )


def image_processor_of(spec: ImageSpec, **options: Any) -> Qwen2VLImageProcessorPil:
    """Transformers' own image processor with this spec; `image.patchify` and `modeling.normalize` give the same values."""
    fields = spec.to_dict()
    del fields["image_processor_type"]
    return Qwen2VLImageProcessorPil(**fields | options)


def find_image_spec(name_or_path: str, vision_config: Any = None, **hub: Any) -> ImageSpec:
    """The spec saved with a checkpoint (folder or hub id), CLIP's mean/std where there is none.

    Raises:
        CheckpointError: the file and the tower's configuration disagree.
    """
    path = _checkpoint_file(name_or_path, PREPROCESSOR_FILE, **hub)
    if path is not None:
        spec = ImageSpec.load(path.parent)
    else:
        logger.warning(
            "no %s beside the tokenizer (%s): using CLIP mean/std, as the published artemis-vlm did",
            PREPROCESSOR_FILE,
            name_or_path or "made in memory",
        )
        spec = ImageSpec(image_mean=CLIP_MEAN, image_std=CLIP_STD)
        if vision_config is not None:
            sizes = vision_config.patch_size, vision_config.temporal_patch_size, vision_config.spatial_merge_size
            spec = ImageSpec(*sizes, image_mean=CLIP_MEAN, image_std=CLIP_STD)
    if vision_config is not None:
        check_spec(spec, vision_config)
    return spec


def check_spec(spec: ImageSpec, vision_config: Any) -> None:
    """Raises CheckpointError when a spec cuts other patches than the tower takes."""
    for field, ours, towers in (
        ("patch_size", spec.patch_size, vision_config.patch_size),
        ("temporal_patch_size", spec.temporal_patch_size, vision_config.temporal_patch_size),
        ("merge_size", spec.merge_size, vision_config.spatial_merge_size),
    ):
        if ours != towers:
            raise CheckpointError(f"{PREPROCESSOR_FILE} says {field} {ours}, the vision tower {towers}; correct the file")


def find_habits(name_or_path: str, **hub: Any) -> dict[str, Any]:
    """`image_turn_thinking` and `max_images_per_turn` of a checkpoint (folder or hub id).

    From `processor_config.json`, else from the model's `config.json`, else the published model's habits: the template's
    own default, and one image.

    Raises:
        CheckpointError: the two files disagree.
    """
    habits: dict[str, Any] = {"image_turn_thinking": True, "max_images_per_turn": 1}
    processor, model = (_checkpoint_json(name_or_path, file, **hub) for file in (PROCESSOR_FILE, "config.json"))
    for name in habits:
        said = [fields[name] for fields in (processor, model) if name in fields]
        if len(set(said)) > 1:
            raise CheckpointError(
                f"{PROCESSOR_FILE} says {name} {said[0]}, config.json {said[1]}; make them equal in {name_or_path}"
            )
        habits[name] = said[0] if said else habits[name]
    return habits


def write_habits(folder: Path, config: ArtemisVLMConfig) -> None:
    """`processor_config.json` of a new model folder, as `ArtemisVLMProcessor.save_pretrained` writes it."""
    fields = {
        "image_token": chat.IMAGE_TOKEN,
        "image_turn_thinking": config.image_turn_thinking,
        "max_images_per_turn": config.max_images_per_turn,
        "processor_class": ArtemisVLMProcessor.__name__,
        "video_token": VIDEO_TOKEN,
    }
    (folder / PROCESSOR_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _checkpoint_json(name_or_path: str, file: str, **hub: Any) -> dict[str, Any]:
    path = _checkpoint_file(name_or_path, file, **hub)
    return {} if path is None else json_object(path)


def _checkpoint_file(name_or_path: str, file: str, **hub: Any) -> Path | None:
    if not name_or_path:
        return None
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / file
        return path if path.exists() else None
    found = cached_file(
        name_or_path, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, **hub
    )
    return None if found is None else Path(found)


def _check_placeholders(placeholders: int, images: int, token: str) -> None:
    if placeholders != images:
        raise SampleError(f"the text holds {placeholders} {token} for {images} images; one each is needed")


def _images_of(conversation: Sequence[Any]) -> list[Any]:
    """The images of a conversation, in order, wherever Transformers' templates let them be."""
    parts = [p for turn in conversation if isinstance(turn.get("content"), (list, tuple)) for p in turn["content"]]
    found = []
    for part in (p for p in parts if p.get("type") in chat.IMAGE_TYPES):
        image = next((part[key] for key in ("image", "url", "path", "base64", "image_url") if key in part), None)
        if image is not None:
            found.append(image.get("url") if isinstance(image, dict) else image)
    return found


def _flatten(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for group in images for image in _flatten(group)]
    return [images]


def _loaded(image: Any, number: int, to_one: bool) -> Any:
    """A PIL image, upright and RGB as `decode_image` makes it; arrays of three channels as they are.

    number: of the image in the call, from 1, for errors
    to_one: whether the image processor will bring 0..255 to [0, 1]

    Raises:
        SampleError: not readable, damaged, too elongated, or an array that is no image of 0..255.
    """
    if isinstance(image, (str, Path)):
        image = _opened(str(image), number)
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        image = _checked_array(image, number, to_one)
    if not isinstance(image, Image.Image):
        return image
    check_aspect_ratio(image.height, image.width)
    try:
        return upright_rgb(image)
    except Exception as error:  # Pillow's decoders raise nearly anything
        raise SampleError(
            f"image {number} ({image.width}x{image.height}) is damaged or cut short; give a whole one"
        ) from error


def _opened(source: str, number: int) -> Image.Image:
    try:
        if source.startswith(("http://", "https://")):
            data = httpx.get(source, timeout=None, follow_redirects=True).content
        elif os.path.isfile(source):
            data = Path(source).read_bytes()
        else:
            data = base64.decodebytes(source.rpartition(",")[2].encode())
        return Image.open(io.BytesIO(data))
    except Exception as error:  # Pillow's own text carries addresses
        named = source if len(source) <= 100 else source[:97] + "..."
        raise SampleError(
            f"image {number} ({named}) cannot be read; expected the path of an image file, an http(s) address or base64 data"
        ) from error


def _checked_array(array: Any, number: int, to_one: bool) -> Any:
    """An array as it is, or a PIL image where it is uint8 and grey (H, W) or has an alpha channel (H, W, 4)."""
    shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
    coloured = len(shape) > 3 or (len(shape) == 3 and 3 in (shape[0], shape[2]))
    if not coloured and dtype == "uint8" and (len(shape) == 2 or shape[2:] == (4,)) and 0 not in shape:
        return Image.fromarray(np.asarray(array))
    if not coloured or 0 in shape:
        raise SampleError(
            f"image {number} is a {dtype} array of the shape {shape}; "
            "expected uint8 (H, W), (H, W, 3), (H, W, 4) or (3, H, W)"
        )
    if to_one and "float" in dtype and array.max() <= 1:
        raise SampleError(f"image {number} is a {dtype} array with values only within [0, 1]; give it as uint8 0..255")
    return array
