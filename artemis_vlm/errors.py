"""The one error tree: what can be wrong with a sample, a checkpoint or a run, said in a sentence.

ArtemisError
├── SampleError        one sample is unusable: training quarantines it, captioning writes it in the row, HTTP answers 400
├── CheckpointError    a folder or file does not hold what it must
└── RunError           a run cannot start or go on: the job prints the sentence and exits non-zero
"""

from __future__ import annotations

import sys
from collections.abc import Callable


class ArtemisError(Exception):
    """Base of every error that is meant for the user's eyes; its text says what was found, expected, and what to do."""


class SampleError(ArtemisError, ValueError):
    """One sample (image, text or both) cannot be used. Never fatal by itself."""


class CheckpointError(ArtemisError, ValueError):
    """A model folder, a manifest or a training checkpoint is damaged or does not fit."""


class RunError(ArtemisError, RuntimeError):
    """A run cannot start, or must stop."""


def exit_code(work: Callable[[], object]) -> int:
    """Of a command that does `work`: the number it gives, else 0; or 1, after what is wrong was told in a sentence."""
    try:
        code = work()
    except ArtemisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0
