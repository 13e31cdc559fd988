"""Names of objects in texts: where they stand, and which objects a text speaks of. Knows nothing of models or images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from artemis_vlm.errors import RunError


class Names:
    """Objects, each with the words for it: `("cat", "cats")` is the object "cat".

    Whole words only ("apple" is not in "pineapple"), the longest name wins ("green apple" before "apple"), and capital
    letters do not matter.
    """

    def __init__(self, forms: Iterable[Sequence[str]]) -> None:
        self.forms = [tuple(words) for words in forms]
        self._object_of = {word.lower(): words[0] for words in self.forms for word in words}

    @classmethod
    def load(cls, path: Path) -> Names:
        """Reads a text file: one object a line, its words separated by commas, the first the object's name.

        Raises:
            RunError: no such file, nothing in it, or a word of two objects.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"the names in {path} cannot be read: {error}; expected lines such as `cat, cats`") from error
        forms = [[word.strip() for word in line.split(",") if word.strip()] for line in lines]
        names = cls(words for words in forms if words)
        if not names.forms:
            raise RunError(f"{path} holds no names; expected lines such as `cat, cats`")
        if len(names._object_of) < len({(w.lower(), words[0]) for words in names.forms for w in words}):
            raise RunError(f"{path} gives one word to two objects; each word may stand in one line only")
        return names

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # `re` takes the first that matches, so the longest stands first.
        ordered = sorted(self._object_of, key=lambda word: (-len(word), word))
        return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, ordered))})(?![\w-])", re.IGNORECASE)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of each name in a text, in order, in characters."""
        return [match.span() for match in self._pattern.finditer(text)]

    def in_text(self, text: str) -> set[str]:
        """The objects that a text names."""
        return {self._object_of[text[start:end].lower()] for start, end in self.spans(text)}
