"""Asks vLLM in two ranks: `python two_ranks.py FOLDER MESSAGES.json OUT.json` writes the new tokens of each answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from asking import NEW_TOKENS, OPTIONS


def main(folder: str, asked: str, answered: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(folder, tensor_parallel_size=2, distributed_executor_backend="mp", max_num_seqs=4, seed=0, **OPTIONS)
    outputs = llm.chat(json.loads(Path(asked).read_text()), SamplingParams(temperature=0, max_tokens=NEW_TOKENS))
    Path(answered).write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":  # vLLM starts its ranks from this file anew
    main(*sys.argv[1:])
