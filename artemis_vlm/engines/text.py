"""Tokens of one answer to its text, as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from artemis_vlm.engines.base import SamplingParams


class AnswerText:
    """Grows with each token. Text that could still become a stop string is held back until it cannot."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], skip_special_tokens: bool) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stop = stop
        self._tokens: list[int] = []
        self._decoded = 0
        self._held = ""
        #: A stop string has appeared: nothing more will come.
        self.stopped = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, sampling: SamplingParams) -> AnswerText:
        return cls(tokenizer, sampling.stop, sampling.skip_special_tokens)

    def push(self, token: int) -> str:
        """The text that can be shown now."""
        self._tokens.append(token)
        piece: str = self._stream.step(self._backend, token) or ""
        self._decoded += len(piece)
        return self._release(self._held + piece)

    def finish(self) -> str:
        """The rest, at the end of the answer: what was held back, and bytes that never became a character."""
        if self.stopped:
            return ""
        whole: str = self._backend.decode(self._tokens, skip_special_tokens=self._skip)
        shown = self._release(self._held + whole[self._decoded :])
        rest, self._held = self._held, ""
        return shown + rest

    def _release(self, text: str) -> str:
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """The longest end of a text that begins a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
