"""The engines: the same greedy tokens as plain `generate` whatever else runs, bounds, cancelling, sampling, text."""

from __future__ import annotations

import asyncio
import math
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import SPEC, tiny_a3
from PIL import Image
from transformers import LlamaConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from artemis_vlm import ArtemisVLMForConditionalGeneration, CheckpointError, RunError, SampleError, chat, graft
from artemis_vlm.engines import (
    Delta,
    EmbeddingCache,
    EngineConfig,
    ImageEmbedding,
    ImageEncoder,
    Request,
    SamplingParams,
    TransformersEngine,
    complete,
    engine_kind,
    load_engine,
)
from artemis_vlm.engines.text import AnswerText
from artemis_vlm.engines.transformers import Answer, StepBatch, draw
from artemis_vlm.image import Patches, patchify
from artemis_vlm.modeling import normalize
from artemis_vlm.vllm_plugin import announce

CONFIG = EngineConfig(slots=3, max_length=96, step_tokens=16)
GRIDS = [(4, 6), (2, 2), (0, 0), (8, 4), (0, 0), (2, 14)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(a3: Path) -> ArtemisVLMForConditionalGeneration:
    return ArtemisVLMForConditionalGeneration.from_pretrained(a3, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def encoder(a3: Path) -> ImageEncoder:
    return ImageEncoder.load(a3, torch.float32)


def patches(seed: int, grid: tuple[int, int]) -> Patches:
    return Patches(np.random.default_rng(seed).integers(0, 256, (grid[0] * grid[1], 768), dtype=np.uint8), grid)


def prompt(tokenizer: PreTrainedTokenizerBase, seed: int, grid: tuple[int, int]) -> tuple[int, ...]:
    words = " ".join(np.random.default_rng(seed).choice(["red", "cat", "left of", "tree", "3", "of"], 1 + seed % 9))
    content = [{"type": "image"}] if grid[0] else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": words}]}]
    tokens = [SPEC.tokens(grid)] if grid[0] else []
    return tuple(chat.encode_prompt(tokenizer, messages, image_tokens=tokens, enable_thinking=False))


class Case:
    """A request, and what plain `generate` answers to it."""

    def __init__(self, number: int, model, encoder: ImageEncoder, tokenizer: PreTrainedTokenizerBase) -> None:
        grid = GRIDS[number % len(GRIDS)]
        ids, image = prompt(tokenizer, number, grid), patches(number, grid)
        images = tuple(encoder.encode([(f"image{number}", image)])) if grid[0] else ()
        self.request = Request(f"r{number}", ids, SamplingParams(max_tokens=3 + number * 5 % 14), images)
        inputs = {}
        if grid[0]:
            inputs["pixel_values"] = normalize(torch.from_numpy(image.pixels), SPEC)
            inputs["image_grid_thw"] = torch.tensor([[1, *grid]])
        tokens = torch.tensor([ids])
        output = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=self.request.sampling.max_tokens,
            do_sample=False,
            pad_token_id=0,
            **inputs,
        )
        self.expected = output[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def cases(model, encoder: ImageEncoder, tokenizer: PreTrainedTokenizerBase) -> list[Case]:
    return [Case(number, model, encoder, tokenizer) for number in range(18)]


def batch_of(a3: Path, tokenizer: PreTrainedTokenizerBase, config: EngineConfig = CONFIG) -> StepBatch:
    return StepBatch(graft.load_decoder(a3, torch.float32), tokenizer, 22, config)


@pytest.fixture(scope="module")
def batch(a3: Path, tokenizer: PreTrainedTokenizerBase) -> StepBatch:
    return batch_of(a3, tokenizer)


def answer(request: Request, tokenizer: PreTrainedTokenizerBase, into: list[Delta]) -> Answer:
    return Answer(request, AnswerText.of(tokenizer, request.sampling), into.append)


def test_greedy_equals_generate_at_random_arrivals_and_departures(
    batch: StepBatch, cases: list[Case], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Images and text mixed; requests join between any two steps, prompts are cut by the budget, some leave early."""
    answered = cancelled = longest = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        waiting = [cases[i] for i in rng.permutation(len(cases))[: int(rng.integers(1, 9))]]
        got: dict[str, list[Delta]] = {}
        leavers = {c.request.id for c in waiting if rng.random() < 0.2}
        while waiting or batch.busy:
            while waiting and rng.random() < 0.4:
                case = waiting.pop()
                batch.check_fits(case.request)
                batch.change([answer(case.request, tokenizer, got.setdefault(case.request.id, []))])
            batch.change([i for i in leavers if i in got and len(got[i]) == 2])
            batch.step()
            longest = max(longest, len(batch.running))
            assert batch.stats().kv_tokens <= batch.stats().kv_capacity_tokens
        for case in cases:
            deltas = got.get(case.request.id)
            if deltas is None:
                continue
            tokens = [t for d in deltas for t in d.token_ids]
            if deltas[-1].finish_reason == "cancelled":
                cancelled += 1
                assert tokens == case.expected[: len(tokens)]
            else:
                answered += 1
                assert tokens == case.expected
                assert "".join(d.text for d in deltas) == tokenizer.decode(
                    [t for t in tokens if t not in batch.ends], skip_special_tokens=True
                )
        assert batch.free == set(range(CONFIG.slots))
    assert answered > 30
    assert cancelled > 3
    assert longest == CONFIG.slots


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_other_decoders(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    fields = {
        "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 2,
    }  # fmt: skip
    decoder = LlamaForCausalLM(LlamaConfig(**fields)) if family == "llama" else Qwen3ForCausalLM(Qwen3Config(**fields))
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    prompts = [torch.randint(30, 200, (n,)) for n in (5, 23, 1, 11)]
    plain = [
        decoder.generate(p[None], attention_mask=torch.ones_like(p[None]), max_new_tokens=9, do_sample=False, pad_token_id=0)
        for p in prompts
    ]
    batch = StepBatch(decoder, tokenizer, 22, CONFIG)
    got: list[list[Delta]] = [[] for _ in prompts]
    sampling = SamplingParams(max_tokens=9)
    batch.change([answer(Request(str(i), tuple(p.tolist()), sampling), tokenizer, got[i]) for i, p in enumerate(prompts)])
    while batch.busy:
        batch.step()
    for tokens, prompt_ids, deltas in zip(plain, prompts, got):
        assert [t for d in deltas for t in d.token_ids] == tokens[0, len(prompt_ids) :].tolist()


def test_what_does_not_fit_is_refused(batch: StepBatch, cases: list[Case], tokenizer: PreTrainedTokenizerBase) -> None:
    request = cases[0].request
    with pytest.raises(SampleError, match="max_tokens is 90; together they may be 96"):
        batch.check_fits(replace(request, sampling=SamplingParams(max_tokens=90)))
    with pytest.raises(SampleError, match="6 image placeholder tokens for 0 image features"):
        batch.check_fits(replace(request, images=()))
    narrow = tuple(replace(image, embeds=image.embeds[:, :3]) for image in request.images)
    with pytest.raises(SampleError, match="image features of width 3; this decoder takes 32"):
        batch.check_fits(replace(request, images=narrow))
    with pytest.raises(SampleError, match="the prompt is empty"):
        batch.check_fits(replace(request, prompt_ids=(), images=()))
    with pytest.raises(RunError, match="step_tokens is 8"):
        EngineConfig(slots=8, step_tokens=8)
    with pytest.raises(RunError, match="attends to 131072 tokens at most"):
        StepBatch(batch.decoder, tokenizer, 22, EngineConfig(max_length=200_000))
    for bounds in ({"kind": "sglang"}, {"slots": 0}, {"quantization": "int4"}, {"gpu_memory": 1.0}):
        with pytest.raises(RunError):
            EngineConfig(**bounds)
    for wrong in ({"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"stop": ("",)}):
        with pytest.raises(SampleError):
            SamplingParams(**{"max_tokens": 1} | wrong)


def test_the_engine_is_chosen_in_one_place(
    a3: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("artemis_vlm.engines.find_spec", lambda name: None)
    caplog.set_level("INFO")
    engine = load_engine(a3, CONFIG, torch.float32)
    engine.close()
    assert isinstance(engine, TransformersEngine)
    assert "the decoder runs on the transformers engine (asked for: auto, device cpu)" in caplog.text
    assert engine_kind("auto", "cuda") == "transformers"
    with pytest.raises(RunError, match=r"the engine is vllm, which is not installed here; pip install"):
        load_engine(a3, EngineConfig(kind="vllm"))
    with pytest.raises(RunError, match="quantization is fp8; the transformers engine has none"):
        load_engine(a3, EngineConfig(quantization="fp8"))
    monkeypatch.setattr("artemis_vlm.engines.find_spec", lambda name: ModuleSpec(name, None, origin="vllm/__init__.py"))
    assert (engine_kind("auto", "cuda:0"), engine_kind("auto", "cpu")) == ("vllm", "transformers")
    assert engine_kind("transformers", "cuda") == "transformers"


def test_vllm_finds_the_plugin_of_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("artemis_vlm.vllm_plugin.entry_points", lambda group: ())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setattr("sys.path", [*sys.path])
    announce()
    code = "import importlib.metadata as m; print([p.value for p in m.entry_points(group='vllm.general_plugins')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "artemis_vlm.vllm_plugin:register" in done.stdout
    code = "import sys, artemis_vlm.engines, artemis_vlm.vllm_plugin; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- the thread and its streams --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(a3: Path):
    engine = TransformersEngine.load(a3, CONFIG, torch.float32)
    yield engine
    engine.close()


def test_many_at_once_over_asyncio(engine: TransformersEngine, cases: list[Case]) -> None:
    async def main() -> list:
        return await asyncio.gather(*(complete(engine, c.request) for c in cases))

    done = asyncio.run(main())
    assert [list(d.token_ids) for d in done] == [c.expected for c in cases]
    assert engine.stats().running == engine.stats().waiting == 0


def test_an_answer_that_the_engine_breaks_off_is_an_error(cases: list[Case]) -> None:
    class Engine:
        async def generate(self, request: Request) -> AsyncIterator[Delta]:
            yield Delta((1,), "half")
            yield Delta((), "", "cancelled")

    with pytest.raises(RunError, match=f"broke off the request {cases[0].request.id} before its answer was whole"):
        asyncio.run(complete(Engine(), cases[0].request))


def test_leaving_a_stream_frees_its_slot(
    engine: TransformersEngine, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = replace(cases[2].request, sampling=SamplingParams(max_tokens=60))
    step = engine._batch.step
    monkeypatch.setattr(engine._batch, "step", lambda: (time.sleep(0.02), step()))

    async def leave() -> None:
        stream = engine.generate(long)
        async for _ in stream:
            break
        await stream.aclose()

    async def cancel_by_id() -> Delta:
        deltas = []
        async for delta in engine.generate(long):
            engine.cancel(long.id)
            deltas.append(delta)
        return deltas[-1]

    async def cancelled_task() -> None:
        task = asyncio.create_task(complete(engine, long))
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def main() -> None:
        await leave()
        assert (await cancel_by_id()).finish_reason in ("cancelled", "stop")
        await cancelled_task()
        for _ in range(100):
            if not engine.stats().running:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("a slot is still held a second after everyone left")

    asyncio.run(main())


def test_closed_and_broken_engines_say_so(a3: Path, cases: list[Case], caplog: pytest.LogCaptureFixture) -> None:
    engine = TransformersEngine.load(a3, CONFIG, torch.float32)

    async def run(request: Request):
        return await complete(engine, request)

    engine._batch.decoder.forward = lambda **_: 1 / 0
    with pytest.raises(RunError, match="the engine broke while the request ran: ZeroDivisionError"):
        asyncio.run(run(cases[0].request))
    with pytest.raises(RunError, match="the engine broke and needs a restart"):
        asyncio.run(run(cases[0].request))
    engine.close()
    assert "the engine broke" in caplog.text

    engine = TransformersEngine.load(a3, CONFIG, torch.float32)
    engine.close()
    with pytest.raises(RunError, match="the engine is closed"):
        asyncio.run(run(cases[0].request))
    assert not any(t.name == "decoder-steps" and t is engine._thread for t in threading.enumerate())


# --- sampling and text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_draws_follow_the_distribution(top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(400) * 2
    sampling = SamplingParams(max_tokens=1, temperature=0.7, top_p=top_p)
    random = torch.Generator().manual_seed(1)
    counts = torch.bincount(torch.tensor([draw(logits, sampling, random) for _ in range(4_000)]), minlength=400)
    p = F.softmax(logits / 0.7, -1)
    order = p.sort(descending=True)
    kept = order.indices[: int((order.values.cumsum(0) - order.values < top_p).sum())]
    expected = torch.zeros(400).index_copy(0, kept, p[kept])
    expected /= expected.sum()
    assert counts[expected == 0].sum() == 0
    assert (counts / 4_000 - expected).abs().sum() / 2 < 0.1


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-42, 0.9), (1e-42, 1.0), (5e-324, 0.5), (1.0, 1e-50), (1.0, 5e-324)])
def test_the_smallest_temperature_and_top_p_take_the_likeliest(temperature: float, top_p: float) -> None:
    random = torch.Generator().manual_seed(1)
    for seed in range(5):
        logits = torch.randn(400, generator=torch.Generator().manual_seed(seed)) * 30
        assert draw(logits, SamplingParams(1, temperature=temperature, top_p=top_p), random) == logits.argmax()


def test_seed_decides_whatever_else_runs(engine: TransformersEngine, cases: list[Case]) -> None:
    drawn = replace(cases[0].request, sampling=SamplingParams(max_tokens=12, temperature=1.0, top_p=0.95, seed=7))

    async def main() -> tuple:
        alone = await complete(engine, drawn)
        others = [complete(engine, c.request) for c in cases[1:6]]
        crowd = (await asyncio.gather(*others, complete(engine, replace(drawn, id="again"))))[-1]
        other = await complete(engine, replace(drawn, sampling=replace(drawn.sampling, seed=8)))
        return alone, crowd, other

    alone, crowd, other = asyncio.run(main())
    assert alone.token_ids == crowd.token_ids != other.token_ids


def test_stop_strings_end_the_text_before_them(engine: TransformersEngine, cases: list[Case]) -> None:
    case = max(cases, key=lambda c: len(c.expected))

    async def main(stop: tuple[str, ...]) -> list[Delta]:
        request = replace(case.request, sampling=replace(case.request.sampling, stop=stop))
        return [d async for d in engine.generate(request)]

    whole = "".join(d.text for d in asyncio.run(main(())))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    deltas = asyncio.run(main((stop, "\x00never")))
    assert "".join(d.text for d in deltas) == whole[: whole.index(stop)]
    assert deltas[-1].finish_reason == "stop"


def test_text_comes_in_whole_characters_and_adds_up(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = np.random.default_rng(0)
    texts = ["Ünïcode 漢字 🦜🏽‍♀️ end", "plain words, twice. plain words", "   spaces\n\n\ttabs  "]
    sequences = [chat.encode_text(tokenizer, t) for t in texts] + [
        rng.integers(1000, 131072, 30).tolist() for _ in range(40)
    ]
    for tokens in sequences:
        text = AnswerText(tokenizer, (), True)
        pieces = [text.push(t) for t in tokens]
        assert "".join(pieces) + text.finish() == tokenizer.decode(tokens, skip_special_tokens=True)
    tokens = chat.encode_text(tokenizer, "one two STOP three")
    for stop in ("STOP", " two STOP th", "e", "three!"):
        text = AnswerText(tokenizer, (stop,), True)
        shown = ""
        for token in tokens:
            shown += text.push(token)
            assert stop not in shown
            if text.stopped:
                break
        assert shown + text.finish() == "one two STOP three".split(stop)[0]


# --- the encoder -----------------------------------------------------------------------------------------------------


def test_encoder_equals_the_models_own_features(model, encoder: ImageEncoder) -> None:
    """Any mix of sizes in one call, with repeats, against one at a time through the whole model."""
    images = [(f"e{i}", patches(i, g)) for i, g in enumerate([(4, 6), (2, 2), (8, 4), (2, 14), (4, 6)])]
    encoded = encoder.encode([*images, images[1]])
    for (key, image), got in zip([*images, images[1]], encoded):
        grid = torch.tensor([[1, *image.grid]])
        expected = model.get_image_features(normalize(torch.from_numpy(image.pixels), SPEC), grid)
        assert (got.key, got.grid, got.embeds.shape) == (key, image.grid, expected.shape)
        assert torch.allclose(got.embeds, expected, rtol=1e-4, atol=1e-5)


def test_images_narrower_or_larger_than_the_folder_expects_are_encoded(a3: Path, encoder: ImageEncoder) -> None:
    """A strip keeps a token across, whatever max_pixels says; a captioning run may allow more pixels."""
    strip = patchify(Image.new("RGB", (1990, 10), "red"), encoder.spec)
    assert len(encoder.encode([("strip", strip)])[0].embeds) == encoder.spec.tokens(strip.grid)
    larger = encoder.spec.with_limits(None, 4 * encoder.spec.max_pixels)
    side = 2 * math.isqrt(encoder.spec.max_pixels)
    patches = patchify(Image.new("RGB", (side, side), "red"), larger)
    allowing = ImageEncoder.load(a3, torch.float32, spec=larger)
    assert len(allowing.encode([("large", patches)])[0].embeds) == larger.tokens(patches.grid)


def test_groups_are_bounded(encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("artemis_vlm.engines.encoder.PACK_PATCHES", 40)
    sizes: list[int] = []
    real = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda group: (sizes.append(len(group)), real(group))[1])
    encoder.encode([(f"g{i}", patches(i, g)) for i, g in enumerate([(4, 4), (4, 4), (4, 4), (8, 8), (2, 2)])])
    assert sizes == [2, 1, 1, 1]


def test_cached_images_are_not_encoded_again(encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encoder.encode([("cached", patches(1, (4, 4)))])
    monkeypatch.setattr(encoder, "_encode", lambda group: pytest.fail("the tower ran"))
    assert encoder.encode([("cached", patches(1, (4, 4)))])[0] is first[0]


def test_cache_is_bounded_in_bytes_and_drops_the_least_recent() -> None:
    cache = EmbeddingCache(max_bytes=3 * 160)
    entries = {k: ImageEmbedding(k, torch.zeros(4, 10), (4, 4)) for k in "abcd"}
    for key in "abc":
        cache.put(entries[key])
    assert cache.get("a") is entries["a"]
    cache.put(entries["d"])
    assert (cache.get("b"), cache.nbytes, len(cache)) == (None, 480, 3)
    cache.put(entries["d"])
    assert cache.nbytes == 480
    cache.put(ImageEmbedding("huge", torch.zeros(100, 10), (4, 4)))
    assert cache.get("huge") is None
    assert (cache.hits, cache.misses) == (1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_embeddings_travel_unchanged(dtype: torch.dtype) -> None:
    sent = ImageEmbedding("k", torch.randn(6, 32).to(dtype), (4, 6))
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
    got = pickle.loads(data, buffers=[bytes(b) for b in buffers])
    assert len(buffers) == 1, "the tensor went through the pickle stream instead of beside it"
    assert torch.equal(got.embeds, sent.embeds)
    assert (got.embeds.dtype, got.key, got.grid) == (dtype, "k", (4, 6))


def test_parts_are_loaded_alone_and_checked(a3: Path, model, sources: graft.Sources) -> None:
    decoder = graft.load_decoder(a3)
    assert decoder.dtype == torch.bfloat16
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor.float(), model.language_model.state_dict()[name]), name
    with pytest.raises(CheckpointError, match="holds a mistral model; expected artemis_vlm"):
        graft.load_config(sources.decoder)
    assert tiny_a3().config.model_type == "artemis_vlm"
