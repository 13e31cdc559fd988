"""The demo's tokenizer: the same ids as Mistral's own encoder, the A-series specials, the chat template."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from demo import assets
from demo.tokenizer import RENAMED, build_tokenizer, tekken_file

SENTENCES = [
    """The hedgehog sat under 3 pine trees, 12.5 m from the "old" mill; it didn't move.""",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Falsches Üben von Xylophonmusik quält jeden größeren Zwerg.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "いろはにほへと ちりぬるを。我能吞下玻璃而不傷身體。키스의 고유조건은 입술끼리 만나야 하고",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण। إن الطفل الصغير يحب القطط، זאת דוגמה בעברית",
    'def f(x: int) -> dict[str, float]:\n\treturn {"a_b": x ** 2 // 7}  # café\r\n',
    """SELECT * FROM t WHERE id>=10 AND name LIKE '%\\n%'; <div class="x">&nbsp;</div> https://a.b/c?d=e&f=%20""",
    "👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 👍🏽 🇫🇷 ☺\ufe0f \U0001d518\U0001d52b ﷽ ½ ① Ⅷ ﬁ e\u0301 é",
]


def varied_texts(count: int, vocabulary: list[bytes]) -> list[str]:
    """`count` texts of seven kinds, always the same ones."""
    rng = random.Random(0)
    scripts = (0x00, 0x250), (0x370, 0x3000), (0x3000, 0xD7FF), (0xE000, 0x1FFFF)  # all but the surrogates
    kinds: list[Callable[[int], str]] = [
        lambda n: "".join(chr(rng.randrange(*rng.choice(scripts))) for _ in range(n)),
        lambda n: " \t\n".join(rng.sample(SENTENCES, 3))[n // 2 :],
        lambda n: "".join(rng.choice(" \t\n\r\v\f\u00a0\u2003 ab.A1") for _ in range(n)),
        lambda n: "".join(rng.choice("aeiouaeioubcdfghlmnprst") for _ in range(n)),
        lambda n: rng.choice("abcxe=-_ \n#") * rng.randrange(1, 400) + rng.choice("ab B0") * n,
        lambda n: f"{rng.randrange(10**n):,} {rng.random():.{n}f} 0x{rng.getrandbits(4 * n):X} {n - 30}",
        lambda n: b"".join(rng.choices(vocabulary, k=n)).decode("utf-8", errors="replace"),
    ]
    return ["", *(kinds[i % len(kinds)](rng.randrange(1, 60)) for i in range(count))]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(assets.tokenizer())
    return loaded


def test_ids_equal_mistrals_own_encoder(tokenizer: PreTrainedTokenizerFast) -> None:
    mistral = Tekkenizer.from_file(tekken_file())
    texts = varied_texts(5000, [mistral.id_to_byte_piece(i) for i in range(1000, 131_072)])
    expected = [mistral.encode(text, bos=False, eos=False) for text in texts]
    assert tokenizer(texts).input_ids == expected
    assert len({i for ids in expected for i in ids}) > 15_000


def test_text_survives_a_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = varied_texts(700, [sentence.encode() for sentence in SENTENCES])
    assert tokenizer.batch_decode(tokenizer(texts).input_ids) == texts


def test_layout(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == 131_072
    assert tokenizer.convert_ids_to_tokens(list(RENAMED)) == list(RENAMED.values())
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 11, 26, 999]) == [
        *("<unk>", "<s>", "</s>", "<pad>", "<SPECIAL_26>", "<SPECIAL_999>")
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 25, 11)
    assert len(tokenizer.get_added_vocab()) == 1000


def test_every_special_is_read_as_one_and_can_be_read_as_text(tokenizer: PreTrainedTokenizerFast) -> None:
    specials = tokenizer.convert_ids_to_tokens(list(range(1000)))
    backend = tokenizer.backend_tokenizer
    assert [backend.encode(token).ids for token in specials] == [[i] for i in range(1000)]
    backend.encode_special_tokens = True
    try:
        assert all(min(backend.encode(f"a{token}b").ids) >= 1000 for token in specials)
    finally:
        backend.encode_special_tokens = False


def test_the_same_bytes_twice(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    build_tokenizer(tmp_path)
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all((tmp_path / name).read_bytes() == (assets.tokenizer() / name).read_bytes() for name in names)


def render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text


USER = {"role": "user", "content": "Hi"}
OPENED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_prompt_opens_a_thinking_block(tokenizer: PreTrainedTokenizerFast) -> None:
    for options, opening in (
        ({}, "<think>\n"),
        ({"enable_thinking": True}, "<think>\n"),
        ({"enable_thinking": False}, "<think>\n\n</think>\n\n"),
    ):
        assert render(tokenizer, [USER], add_generation_prompt=True, **options) == OPENED + opening


def test_an_answered_turn_is_the_prompt_without_thinking_and_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = render(tokenizer, [USER], add_generation_prompt=True, enable_thinking=False)
    answered = render(tokenizer, [USER, {"role": "assistant", "content": "Yes"}])
    assert answered == prompt + "Yes<|im_end|>\n"


def test_images_and_system(tokenizer: PreTrainedTokenizerFast) -> None:
    image = {"type": "image_url", "image_url": {"url": "x.jpg"}}
    parts = [{"type": "image"}, {"type": "text", "text": "and "}, image]
    one = "<|vision_start|><|image_pad|><|vision_end|>"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert render(tokenizer, messages) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{one}and {one}<|im_end|>\n"
    )


def test_earlier_reasoning_is_dropped_and_later_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    inline = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}
    field = {"role": "assistant", "content": "Yes", "reasoning_content": "hm"}
    for turn in inline, field:
        assert render(tokenizer, [USER, turn]) == OPENED + "<think>\nhm\n</think>\n\nYes<|im_end|>\n"
        assert render(tokenizer, [USER, turn, USER]) == OPENED + "Yes<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def test_tools(tokenizer: PreTrainedTokenizerFast) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}, {"name": "f", "arguments": '{"a": 2}'}]
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
    ]
    text = render(tokenizer, messages, tools=[tool])
    head, rest = text.split("<|im_end|>\n", 1)
    assert head.startswith("<|im_start|>system\n# Tools\n")
    assert '<tools>\n{"type": "function", "function": {"name": "f"}}\n</tools>' in head
    assert rest == (
        OPENED + '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
    )


def test_an_unknown_role_or_part_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="not robot"):
        render(tokenizer, [{"role": "robot", "content": "x"}])
    with pytest.raises(Exception, match="not audio"):
        render(tokenizer, [{"role": "user", "content": [{"type": "audio"}]}])
