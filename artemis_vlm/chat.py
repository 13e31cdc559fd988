"""Messages to token ids: the one prompt path of training, serving and captioning.

Serves any decoder, through the decoder's own chat template. The template is trusted, what people write is not: the
template is rendered with unguessable sentinels in place of every written string, the result is cut at the sentinels,
template pieces are encoded with special tokens and written pieces without. So "<|image_pad|>" typed by a user stays
text, and no written text is ever rendered and then tokenized.

Knows nothing of pixels: an image is a number of tokens.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from artemis_vlm.errors import RunError, SampleError

IMAGE_TOKEN: Final = "<|image_pad|>"
IMAGE_TYPES: Final = frozenset({"image", "image_url"})
Message = Mapping[str, Any]

#: Keys whose value goes to the template as it is, since it may steer by them; so they must spell no token.
_STRUCTURAL: Final = ("type", "id", "tool_call_id")
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class _Sentinels:
    """Written strings, each behind a sentinel that no writer can guess and no template can alter."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.nonce = secrets.token_hex(8)
        self.written: list[str] = []
        self.specials = tokenizer.get_added_vocab().keys()

    def hide(self, text: str) -> str:
        """The sentinel for a string; outer white space stays outside, since templates trim it and ask for it."""
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        return text[:start] + self._sentinel(core) + text[start + len(core) :]

    def hide_json(self, value: Any) -> Any:
        """A JSON value with its dangerous strings hidden.

        The quotes around a JSON string keep it from joining its neighbours into a special token, so a string that
        holds none is left to the template, and tokens merge across the quotes as the decoder has seen them.
        """
        if isinstance(value, str):
            escaped = json.dumps(value, ensure_ascii=False)[1:-1]
            return self._sentinel(escaped) if any(special in escaped for special in self.specials) else value
        if isinstance(value, Mapping):
            return {self.hide_json(str(k)): self.hide_json(v) for k, v in value.items()}
        return [self.hide_json(v) for v in value] if isinstance(value, list) else value

    def _sentinel(self, text: str) -> str:
        self.written.append(text)
        return f"x{self.nonce}n{len(self.written) - 1}x"

    def pieces(self, rendered: str) -> Iterator[tuple[bool, str]]:
        """(was it written by a person, text) in order; white space next to a written piece goes with it.

        A tokenizer merges a space into the word behind it, so it must see both together; for the same reason written
        pieces with nothing between them are one.
        """
        parts = re.split(rf"(\s*)x{self.nonce}n(\d+)x(\s*)", rendered)
        yield False, parts[0]
        written = ""
        for before, index, after, template in zip(*[iter(parts[1:])] * 4):
            written += before + self.written[int(index)] + after
            if template:
                yield True, written
                yield False, template
                written = ""
        if written:
            yield True, written


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    image_tokens: Sequence[int] = (),
    enable_thinking: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_images_per_turn: int = 1,
) -> list[int]:
    """Token ids of a conversation, up to where the assistant is to speak.

    On benign text these are the ids of `apply_chat_template(..., add_generation_prompt=True)`, image placeholders
    expanded; only a merge across the border of a written text and a template that touches it without a space differs.

    Args:
        messages: OpenAI or Hugging Face style; content is a string or a list of text and image parts.
        image_tokens: how many tokens each image takes, in the order of the image parts.
        enable_thinking: passed to the template; None leaves the template's own default.
        tools: JSON schemas of functions, rendered by the decoder's own template.
        max_images_per_turn: what the model's configuration allows.

    Raises:
        SampleError: images in the messages and `image_tokens` differ in number, a turn holds too many, or the template
            refuses the messages.
    """
    images = count_images(messages, max_images_per_turn)
    if images != len(image_tokens):
        raise SampleError(f"the messages hold {images} images but {len(image_tokens)} were given")
    sentinels = _Sentinels(tokenizer)
    rendered = _render(
        tokenizer,
        [_hide_message(m, sentinels) for m in messages],
        tools=[_hide_tool(t, sentinels) for t in tools] if tools else None,
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
    )
    ids = _encode_pieces(tokenizer, sentinels.pieces(rendered))
    return _expand_images(ids, image_tokens, image_token_id(tokenizer))


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    image_tokens: Sequence[int] = (),
    enable_thinking: bool | None = None,
    max_images_per_turn: int = 1,
) -> tuple[list[int], int]:
    """Token ids of a conversation that ends with the assistant's turn, and how many of them are prompt.

    The prompt is `encode_prompt` of the turns before, so an empty think block belongs to it and is never a target.
    The target is the last turn's text and the tokens that close the turn, to the first that ends generation. A thought is
    part of the target, between the template's own marks; prompt and target together are then the ids that the template
    gives for the whole conversation.

    Raises:
        SampleError: as `encode_prompt` and `target_of`; or the template renders no thought behind such a prompt.
    """
    thought, answer = target_of(messages)
    prompt = encode_prompt(
        tokenizer,
        messages[:-1],
        image_tokens=image_tokens,
        enable_thinking=enable_thinking,
        max_images_per_turn=max_images_per_turn,
    )
    if thought is None:
        target = encode_text(tokenizer, answer)
    else:
        target = _encode_thought(tokenizer, thought, answer, enable_thinking)
    return prompt + target + turn_end(tokenizer), len(prompt)


def target_of(messages: Sequence[Message]) -> tuple[str | None, str]:
    """The thought of a training conversation's last turn (None where it has none) and its answer.

    The thought is the turn's `reasoning_content`, else what stands before `</think>` in its text.

    Raises:
        SampleError: the last turn is not the assistant's, is not text alone, calls tools, or has no answer.
    """
    if not messages or messages[-1].get("role") != "assistant":
        raise SampleError("a training conversation must end with an assistant turn")
    turn = messages[-1]
    if turn.get("tool_calls"):
        raise SampleError("the assistant's last turn holds tool_calls; only text is trained, so end with a turn of text")
    text = _text_of(turn)
    reasoning = turn.get("reasoning_content")
    thought, answer = (str(reasoning), text) if reasoning else _split_thought(text)
    if not answer.strip():
        raise SampleError("the assistant's text is empty")
    return thought, answer


@dataclass(frozen=True, slots=True)
class CaptionFrame:
    """`encode_example` of "one image, one fixed prompt, one caption", with all that never changes done once."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    end: tuple[int, ...]
    image_id: int

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase, prompt: str, enable_thinking: bool | None) -> CaptionFrame:
        image_id = image_token_id(tokenizer)
        ids = encode_prompt(tokenizer, caption_messages(prompt), image_tokens=[1], enable_thinking=enable_thinking)
        at = ids.index(image_id)
        return cls(tuple(ids[:at]), tuple(ids[at + 1 :]), tuple(turn_end(tokenizer)), image_id)

    def prompt(self, image_tokens: int) -> list[int]:
        return [*self.before, *[self.image_id] * image_tokens, *self.after]

    def example(self, tokenizer: PreTrainedTokenizerBase, caption: str, image_tokens: int) -> tuple[list[int], int]:
        """Token ids and how many of them are prompt."""
        prompt = self.prompt(image_tokens)
        return prompt + self.caption(tokenizer, caption), len(prompt)

    def caption(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """Token ids of the part that is predicted."""
        return self.captions(tokenizer, [text])[0]

    def captions(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
        """The same for many at once, which takes less time each."""
        return [[*ids, *self.end] for ids in encode_texts(tokenizer, texts)]


def caption_messages(prompt: str) -> list[dict[str, Any]]:
    """The conversation in which a caption is asked for."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]


def image_thinking(has_image: bool, image_turn_thinking: bool) -> bool | None:
    """The default of `enable_thinking`: image turns as the checkpoint was trained, text turns as the template says."""
    return False if has_image and not image_turn_thinking else None


def with_habits(template: str, image_turn_thinking: bool, max_images_per_turn: int) -> str:
    """A chat template that knows a checkpoint's habits by itself, for engines that render it with nobody's help.

    The same ids as `encode_prompt` with `image_thinking`, on text that spells no control tokens: image turns get the
    checkpoint's own `enable_thinking` unless the caller gives one, and too many images in a turn are refused. (Its loop
    over the parts also tells vLLM, which looks for one, to leave images where the messages have them.)
    """
    thinks = "enable_thinking" in template and not image_turn_thinking
    habit = "{%- if seen.images and enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}"
    return _COUNT_IMAGES.replace("LIMIT", str(max_images_per_turn)) + (habit if thinks else "") + template


_COUNT_IMAGES: Final = """\
{%- set seen = namespace(images=0, turn=0) -%}
{%- for message in messages -%}
    {%- if message.content and message.content is not string -%}
        {%- set seen.turn = 0 -%}
        {%- for part in message.content -%}
            {%- if part.type in ('image', 'image_url') -%}
                {%- set seen.turn = seen.turn + 1 -%}
            {%- endif -%}
        {%- endfor -%}
        {%- if seen.turn > LIMIT -%}
            {{- raise_exception('a turn holds ' ~ seen.turn ~ ' images; this model takes at most LIMIT in a turn') -}}
        {%- endif -%}
        {%- set seen.images = seen.images + seen.turn -%}
    {%- endif -%}
{%- endfor -%}"""


def count_images(messages: Sequence[Message], max_per_turn: int | None = None) -> int:
    """Images in a conversation; the one place where too many in a turn are refused.

    Raises:
        SampleError: a turn holds more than `max_per_turn`, or its content is neither a string nor a list of parts.
    """
    total = 0
    for message in messages:
        content = _content(message)
        found = 0 if isinstance(content, str) else sum(part.get("type") in IMAGE_TYPES for part in content)
        if max_per_turn is not None and found > max_per_turn:
            raise SampleError(
                f"a {message.get('role')} turn holds {found} images; this model takes at most {max_per_turn} in a turn "
                "(max_images_per_turn in its config.json)"
            )
        total += found
    return total


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `<|image_pad|>`.

    Raises:
        RunError: the tokenizer has no such token.
    """
    found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)  # get_vocab() would build a dict of the whole vocabulary
    if found is None or tokenizer.convert_ids_to_tokens(found) != IMAGE_TOKEN:
        raise RunError(f"the tokenizer has no {IMAGE_TOKEN} token; use one of the A-series layout, which names slot 22 so")
    return int(found)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of text that a person wrote: never a special or an added token, whatever it spells."""
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """`encode_text` of each; at once, and without the offsets that nobody reads, it takes a fifth less time."""
    return [e.ids for e in _plain(tokenizer).encode_batch_fast(list(texts), add_special_tokens=False)]


def text_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Where in the text each token of `encode_text` stands: (start, end) in characters."""
    return list(_plain(tokenizer).encode(text, add_special_tokens=False).offsets)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that close an assistant turn, to the first special one; the end of sequence if the template has none."""
    sentinels = _Sentinels(tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": sentinels.hide("a")}]
    rendered = _render(tokenizer, turns, tools=None, add_generation_prompt=False, enable_thinking=None)
    *_, (written, closing) = sentinels.pieces(rendered)
    ids = [] if written else tokenizer.encode(closing, add_special_tokens=False)
    special = set(tokenizer.all_special_ids)
    for length, token in enumerate(ids, 1):
        if token in special:
            return list(ids[:length])
    return [int(tokenizer.eos_token_id)]


# --- inside ----------------------------------------------------------------------------------------------------------


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Any], *, enable_thinking: bool | None, **kwargs: Any) -> str:
    if enable_thinking is not None:
        kwargs["enable_thinking"] = enable_thinking
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
    except TemplateError as error:
        raise SampleError(f"the decoder's chat template refused the messages: {error}") from error


def _hide_message(message: Message, sentinels: _Sentinels) -> dict[str, Any]:
    """A message with every written string behind a sentinel."""
    role = message.get("role")
    if not isinstance(role, str) or not _NAME.fullmatch(role):
        raise SampleError(f"a message has the role {role!r}; expected system, user, assistant or tool")
    hidden: dict[str, Any] = {"role": role}
    for key in _STRUCTURAL:
        if (value := message.get(key)) is not None:
            hidden[key] = _checked_name(value, f"a message has the {key}")
    content = _content(message)
    if isinstance(content, str):
        if role == "assistant" and not message.get("reasoning_content"):
            # Templates look for the think block in the text, which they will not see: hand them its two parts.
            thought, content = _split_thought(content)
            hidden["reasoning_content"] = sentinels.hide(thought or "")
        hidden["content"] = sentinels.hide(content)
    else:
        hidden["content"] = [_hide_part(part, sentinels) for part in content]
    if reasoning := message.get("reasoning_content"):
        hidden["reasoning_content"] = sentinels.hide(str(reasoning))
    if calls := message.get("tool_calls"):
        hidden["tool_calls"] = [_hide_call(call, sentinels) for call in calls]
    if name := message.get("name"):
        hidden["name"] = _checked_name(name, "a function is named")
    return hidden


def _content(message: Message) -> str | Sequence[Message]:
    """A message's text or parts; "" where it has none."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    turn = f"a {message.get('role')} turn's content"
    if not isinstance(content, (list, tuple)):
        raise SampleError(f"{turn} is a {type(content).__name__}; expected a string or a list of parts")
    for part in content:
        if not isinstance(part, Mapping):
            raise SampleError(f'{turn} lists a {type(part).__name__}; expected parts like {{"type": "text", "text": "..."}}')
    return content


def _hide_part(part: Message, sentinels: _Sentinels) -> dict[str, Any]:
    kind = part.get("type")
    if kind in IMAGE_TYPES:
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": sentinels.hide(part["text"])}
    raise SampleError(f"a content part has the type {kind!r}; expected text with a string, image or image_url")


def _hide_call(call: Message, sentinels: _Sentinels) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    hidden = {
        "name": _checked_name(function.get("name"), "a function is named"),
        "arguments": sentinels.hide(arguments) if isinstance(arguments, str) else sentinels.hide_json(arguments),
    }
    return {"type": "function", "function": hidden}


def _hide_tool(tool: Mapping[str, Any], sentinels: _Sentinels) -> dict[str, Any]:
    function = dict(tool.get("function", {}))
    name = _checked_name(function.pop("name", None), "a function is named")
    return {"type": "function", "function": {"name": name, **{k: sentinels.hide_json(v) for k, v in function.items()}}}


def _checked_name(name: Any, found: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SampleError(f"{found} {name!r}; expected 1 to 64 of the characters A-Z a-z 0-9 _ . -")
    return name


def _text_of(message: Message) -> str:
    content = _content(message)
    if isinstance(content, str):
        return content
    if all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    raise SampleError("the assistant's turn must be text")


def _split_thought(text: str) -> tuple[str | None, str]:
    """The thought that an assistant's text begins with, if any, and the answer, told apart as the templates do.

    The opening mark may be missing, since prompts end with it.
    """
    head, closing, answer = text.partition("</think>")
    before, _, thought = head.rpartition("<think>")
    if not closing or before.strip():
        return None, text
    return thought.strip("\n"), answer.lstrip("\n")


def _encode_thought(
    tokenizer: PreTrainedTokenizerBase, thought: str, answer: str, enable_thinking: bool | None
) -> list[int]:
    """Token ids of a thought and its answer as the template renders them, from where its prompt ends to the answer's end."""
    sentinels = _Sentinels(tokenizer)
    question = {"role": "user", "content": "a"}
    turn = {"role": "assistant", "content": sentinels.hide(answer), "reasoning_content": sentinels.hide(thought)}
    prompt = _render(tokenizer, [question], tools=None, add_generation_prompt=True, enable_thinking=enable_thinking)
    whole = _render(tokenizer, [question, turn], tools=None, add_generation_prompt=False, enable_thinking=enable_thinking)
    if not whole.startswith(prompt) or whole.count(sentinels.nonce) != len(sentinels.written):
        raise SampleError(
            "the assistant's last turn holds a thought, but the decoder's chat template renders none behind a prompt with "
            f"enable_thinking={enable_thinking}; enable thinking or leave the thought out"
        )
    pieces = list(sentinels.pieces(whole[len(prompt) :]))
    if not pieces[-1][0]:  # what closes the turn
        del pieces[-1]
    return _encode_pieces(tokenizer, pieces)


def _encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[tuple[bool, str]]) -> list[int]:
    ids: list[int] = []
    for written, text in pieces:
        ids += encode_text(tokenizer, text) if written else tokenizer.encode(text, add_special_tokens=False)
    return ids


def _expand_images(ids: list[int], image_tokens: Sequence[int], image_id: int) -> list[int]:
    found = ids.count(image_id)
    if found != len(image_tokens):
        raise SampleError(
            f"the decoder's chat template rendered {found} {IMAGE_TOKEN} for {len(image_tokens)} images; "
            "it must render one for each image part"
        )
    counts = iter(image_tokens)
    return [token for i in ids for token in ([i] * next(counts) if i == image_id else [i])]


def _plain(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer's own model without its added tokens, so that no written text can spell one. Shared, so made at once."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise RunError(f"{type(tokenizer).__name__} is not a fast tokenizer; convert it to a tokenizer.json")
    plain = Tokenizer(backend.model)
    plain.normalizer = backend.normalizer
    plain.pre_tokenizer = backend.pre_tokenizer
    plain.post_processor = backend.post_processor
    return plain
