"""What the tests on vLLM ask, and of which engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

#: What every engine here is told.
OPTIONS: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 640}
NEW_TOKENS = 20


@dataclass(frozen=True)
class Conversation:
    """What is asked, and with which image."""

    text: str
    image: Image.Image | None = None

    def messages(self, image: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """With the image as a part of another form where one is given."""
        parts = [] if self.image is None else [image or {"type": "image", "image": self.image}]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.text}]}]


@dataclass(frozen=True)
class Plain:
    """Transformers' own answer: prompt ids, new tokens to the one that ends, and their text."""

    prompt: list[int]
    tokens: list[int]
    text: str
