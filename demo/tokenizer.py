"""The A-series tokenizer on Mistral's Tekken vocabulary, as a Hugging Face folder.

The vocabulary is Mistral-Nemo's (`tekken_240718.json` of mistral-common): 131,072 ids, of which 0–999 are specials
and 1000 + r is the byte sequence of rank r. Twelve specials that Tekken leaves unused get names; nothing is resized.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from transformers import PreTrainedTokenizerFast
from transformers.integrations.mistral import MistralConverter

from demo.packages import data_file

TEMPLATE = Path(__file__).with_name("chat_template.jinja")

#: Specials that have a name of their own in the A-series.
RENAMED = {
    14: "<think>",
    15: "</think>",
    16: "<tool_call>",
    17: "</tool_call>",
    18: "<tool_response>",
    19: "</tool_response>",
    20: "<|vision_start|>",
    21: "<|vision_end|>",
    22: "<|image_pad|>",
    23: "<|video_pad|>",
    # The ends of a ChatML turn. These two slots are the demo's choice; the ten above are the A-series layout.
    24: "<|im_start|>",
    25: "<|im_end|>",
}


def tekken_file() -> Path:
    """Mistral's own vocabulary file, from the installed mistral-common."""
    return data_file("mistral-common", "mistral_common/data/tekken_240718.json")


def build_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`.

    No BOS is added to a text: ChatML begins with `<|im_start|>`, and the demo's decoder never saw a BOS before it.
    Specials written in a text are read as specials; `backend_tokenizer.encode_special_tokens = True` reads them as
    text. For that switch to reach all of them every special is marked special, `<think>` and `<tool_call>` too (Qwen3
    leaves those two unmarked): decode with `skip_special_tokens=False` to see them.
    """
    tekken = json.loads(tekken_file().read_text(encoding="utf-8"))
    # This vocabulary predates the `special_tokens` field and takes mistral-common's defaults; written out here, they
    # can be renamed, and Mistral's file format does the rest.
    names = [f"<SPECIAL_{i}>" for i in range(tekken["config"]["default_num_special_tokens"])]
    for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS:
        names[token["rank"]] = str(getattr(token["token_str"], "value", token["token_str"]))
    for i, name in RENAMED.items():
        names[i] = name
    tekken["special_tokens"] = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]

    # Beside the output, not in it: AutoTokenizer prefers a tekken.json to everything else it finds in a folder.
    with TemporaryDirectory() as aside:
        renamed = Path(aside) / "tekken.json"
        renamed.write_text(json.dumps(tekken), encoding="utf-8")
        converted = MistralConverter(str(renamed)).converted()
    PreTrainedTokenizerFast(
        tokenizer_object=converted,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=TEMPLATE.read_text(encoding="utf-8"),
    ).save_pretrained(folder)
