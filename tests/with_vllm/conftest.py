"""vLLM's CPU build beside Transformers, on the embedded model in float32; `make test-vllm`, in an environment of its own.

Engines start once: one with pixels in this process, one with embeddings, one server.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # `LLM` computes in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")

import pytest
import torch
from asking import NEW_TOKENS, OPTIONS, Conversation, Plain
from safetensors.torch import save_file

from artemis_vlm import ArtemisVLMForConditionalGeneration, graft
from artemis_vlm.processing import ArtemisVLMProcessor

collect_ignore_glob = [] if find_spec("vllm") else ["test_*"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded A3, with weights of DeepStack's mergers in it as a real tower has them."""
    source, made = Path(os.environ["A3_FOLDER"]), tmp_path_factory.mktemp("model") / "a3"
    made.mkdir()
    for file in source.iterdir():
        (made / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["deepstack_visual_indexes"] = [2]
    (made / "config.json").unlink()
    (made / "config.json").write_text(json.dumps(config))
    merged, outside = 4 * config["vision_config"]["hidden_size"], config["vision_config"]["out_hidden_size"]
    shapes = {
        "norm.weight": (merged,),
        "norm.bias": (merged,),
        "linear_fc1.weight": (merged, merged),
        "linear_fc1.bias": (merged,),
        "linear_fc2.weight": (outside, merged),
        "linear_fc2.bias": (outside,),
    }
    extra = {f"visual.deepstack_merger_list.0.{k}": torch.randn(s).bfloat16() for k, s in shapes.items()}
    save_file(extra, made / "model-deepstack.safetensors")
    files = dict.fromkeys(graft.stored_tensors(source), graft.WEIGHTS_FILE)
    index = {"weight_map": files | dict.fromkeys(extra, "model-deepstack.safetensors")}
    (made / graft.INDEX_FILE).write_text(json.dumps(index))
    return made


@pytest.fixture(scope="session")
def conversations() -> list[Conversation]:
    """Real images of several sizes, and text alone, mixed."""
    from demo import scenes

    images = [scenes.scene(0, i, split="heldout").image for i in range(4)]
    images[1] = images[1].resize((200, 333))
    images[2] = images[2].resize((1024, 700))
    images[3] = images[3].resize((40, 64))
    return [
        Conversation("Describe this image in detail.", images[0]),
        Conversation("What is the capital of France?"),
        Conversation("What colour is it?", images[1]),
        Conversation("Describe this image in detail.", images[2]),
        Conversation("Write a short poem about the sea, with  two spaces and ünïcode 漢字."),
        Conversation("Describe this image in detail.", images[3]),
    ]


@pytest.fixture(scope="session")
def plain(folder: Path, conversations: Sequence[Conversation]) -> list[Plain]:
    processor = ArtemisVLMProcessor.from_pretrained(folder)
    model = ArtemisVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for conversation in conversations:
        batch = processor.apply_chat_template(
            conversation.messages(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        out = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        prompt = batch["input_ids"][0].tolist()
        tokens = out[0, len(prompt) :].tolist()
        answers.append(Plain(prompt, tokens, processor.tokenizer.decode(tokens, skip_special_tokens=True)))
    return answers


@pytest.fixture(scope="session")
def llm(folder: Path, plain: object) -> Iterator[Any]:
    """vLLM's own offline engine, with pixels. Made after the reference, whose threads it would bind."""
    from vllm import LLM

    yield LLM(str(folder), max_num_seqs=8, max_num_batched_tokens=640, seed=0, **OPTIONS)
    sys.stdout.flush()
