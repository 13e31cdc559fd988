"""Tensor parallelism: tower, projector and decoder split over two processes give the tokens of plain `generate`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from asking import NEW_TOKENS, Conversation
from models import tiny_config
from test_plugin import messages
from transformers import AutoTokenizer

from artemis_vlm import ArtemisVLMForConditionalGeneration, ArtemisVLMProcessor


def write_divisible(folder: Path, tokenizer_of: Path) -> ArtemisVLMForConditionalGeneration:
    """A random A3 whose heads two ranks can share; those of the embedded decoder are nine."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
    }
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = tiny_config(vocab_size=len(tokenizer), **sizes, **ends)
    torch.manual_seed(0)
    model = ArtemisVLMForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.12)
    model.save_pretrained(folder)
    processor = ArtemisVLMProcessor(tokenizer=tokenizer, vision_config=config.vision_config)
    processor.image_turn_thinking = config.image_turn_thinking
    processor.save_pretrained(folder)
    return model


def test_two_ranks_give_the_tokens_of_plain_generate(
    folder: Path, conversations: Sequence[Conversation], tmp_path: Path
) -> None:
    model = write_divisible(tmp_path / "a3", folder)
    processor = ArtemisVLMProcessor.from_pretrained(tmp_path / "a3")
    expected = []
    for conversation in conversations:
        batch = processor.apply_chat_template(
            conversation.messages(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        out = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        expected.append(out[0, batch["input_ids"].shape[1] :].tolist())
    asked, answered = tmp_path / "messages.json", tmp_path / "answers.json"
    asked.write_text(json.dumps([messages(c) for c in conversations]))
    script = Path(__file__).with_name("two_ranks.py")
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, str(script), str(tmp_path / "a3"), str(asked), str(answered)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(answered.read_text()) == expected
