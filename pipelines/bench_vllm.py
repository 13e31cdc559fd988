"""What an A3 costs on vLLM at full shapes: the decoder fed with embeddings, beside vLLM alone and one engine with pixels.

Random weights, random pixels. Two engines, started one after the other on the same card:

    mono       vLLM's `LLM` on the whole folder, through the plugin: pixels in, and embeddings in for the decoder alone
    separate   `VllmEngine` on the decoder, `ImageEncoder` beside it: what serving and captioning run
    fp8        the same with the decoder's linear layers in 8 bits

Needs torch, transformers and vLLM, no Ray. A row is printed, and written, when it is there.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeVar

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import MistralConfig, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from artemis_vlm.chat import IMAGE_TOKEN
from artemis_vlm.configuration import ArtemisVLMConfig
from artemis_vlm.engines import EngineConfig, ImageEmbedding, ImageEncoder, Request, SamplingParams, complete
from artemis_vlm.image import ImageSpec, Patches, patchify
from artemis_vlm.modeling import ArtemisVLMProjector
from artemis_vlm.processing import write_habits
from artemis_vlm.vllm_plugin import ARCHITECTURE, announce
from pipelines.bench_shapes import SHAPES, Report, Shapes, hardware

T = TypeVar("T")
PARTS: Final = ("mono", "separate", "fp8")
IMAGE_ID: Final = 22
#: Text tokens before and after the image.
BEFORE, AFTER = 10, 10
#: Images in one call of a tower.
BATCH: Final = 32
TINY: Final = Shapes(
    {"depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 96}
    | {"num_position_embeddings": 64, "deepstack_visual_indexes": [1]},
    MistralConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        sliding_window=None,
        tie_word_embeddings=False,
    ),
)
#: Set unless the caller did: nothing of this needs a network, and the sampler needs no compiler.
ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


@dataclass(frozen=True)
class VllmBench:
    """One run of the benchmark.

    parts: which engines, in order
    side: pixels along each side of an image
    concurrency: at which decoding steps are measured
    images: captioned at once; also the sequences that an engine takes
    """

    shapes: str = "a3"
    parts: Sequence[str] = ("mono", "separate")
    json_file: str = ""
    side: int = 512
    new_tokens: int = 180
    concurrency: Sequence[int] = (1, 32, 128)
    images: int = 512

    @classmethod
    def of(cls, shapes: str, parts: Sequence[str], json_file: str) -> VllmBench:
        if shapes == "tiny":
            return cls(shapes, parts, json_file, side=128, new_tokens=16, concurrency=(1, 4), images=12)
        return cls(shapes, parts, json_file)


def run(bench: VllmBench) -> int:
    """Measures and prints; returns the exit code."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with TemporaryDirectory(prefix="artemis-bench-") as folder:
        bed = Bed(bench, Path(folder), TINY if bench.shapes == "tiny" else SHAPES[bench.shapes], device)
        bed.write_model()
        print(json.dumps(bed.about), flush=True)
        announce()
        for part in bench.parts:
            with bed.report.guarded(part):
                {"mono": measure_mono, "separate": measure_separate, "fp8": measure_separate}[part](bed, part)
    print(f"whole benchmark {bed.seconds:.0f} s; failures: {bed.report.failures or 'none'}", flush=True)
    bed.save()
    return 1 if bed.report.failures else 0


@dataclass
class Bed:
    """What everything is measured on: the folder, the device, the same kind of inputs for all, and the rows so far."""

    bench: VllmBench
    folder: Path
    shapes: Shapes
    device: torch.device
    report: Report = field(default_factory=Report)
    started: float = field(default_factory=time.perf_counter)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec(max_pixels=self.bench.side**2)

    @property
    def grid(self) -> tuple[int, int]:
        return (self.bench.side // 16,) * 2

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def about(self) -> dict[str, Any]:
        import vllm

        fields = {name: getattr(self.bench, name) for name in ("shapes", "side", "new_tokens", "images")}
        return hardware(self.device) | {"vllm": vllm.__version__} | fields

    @property
    def options(self) -> dict[str, Any]:
        """Of vLLM's engines, both."""
        tiny = {"enforce_eager": True, "block_size": 32} if self.device.type == "cpu" else {}
        return {"load_format": "dummy", **tiny}

    @property
    def config(self) -> EngineConfig:
        return EngineConfig(kind="vllm", slots=self.bench.images)

    def row(self, part: str, what: str, **figures: Any) -> dict[str, Any]:
        """One more row: printed now, and in the file, so that a run that is cut off leaves what it measured."""
        rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}
        row = {"part": part, "what": what, **rounded, "at_s": round(self.seconds)}
        self.report.rows.append(row)
        print(json.dumps(row), flush=True)
        self.save()
        return row

    def found(self, part: str, what: str, figure: str) -> float | None:
        """A figure of an earlier row."""
        return next((r[figure] for r in self.report.rows if (r["part"], r["what"]) == (part, what)), None)

    def save(self) -> None:
        if self.bench.json_file:
            content = {"about": self.about, "rows": self.report.rows, "failures": self.report.failures}
            Path(self.bench.json_file).write_text(json.dumps(content, indent=1) + "\n")

    def write_model(self) -> None:
        """An A3 folder without weights, whose tokens mean nothing and never end an answer."""
        text = self.shapes.text
        vocabulary = {f"t{number}": number for number in range(text.vocab_size)}
        specials = {20: "<|vision_start|>", 21: "<|vision_end|>", IMAGE_ID: IMAGE_TOKEN}
        for number, name in specials.items():
            del vocabulary[f"t{number}"]
            vocabulary[name] = number
        words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="t0")), unk_token="t0")
        words.add_special_tokens({"additional_special_tokens": list(specials.values())})
        words.save_pretrained(self.folder)
        fields = text.to_dict() | {"eos_token_id": None, "dtype": str(self.dtype).removeprefix("torch.")}
        vision = Qwen3VLVisionConfig(**self.shapes.vision).to_dict()
        config = ArtemisVLMConfig(vision, fields, image_turn_thinking=False, architectures=[ARCHITECTURE], dtype=self.dtype)
        self.spec.save(self.folder)
        write_habits(self.folder, config)
        config.save_pretrained(self.folder)

    # --- inputs ---

    def images(self, count: int) -> list[Image.Image]:
        shape = (self.bench.side, self.bench.side, 3)
        return [Image.fromarray(self.random.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]

    def embeddings(self, count: int) -> list[ImageEmbedding]:
        shape = self.spec.tokens(self.grid), self.shapes.text.hidden_size
        return [
            ImageEmbedding(f"e{next(self.numbers)}", (torch.randn(shape) * 0.02).to(self.dtype), self.grid)
            for _ in range(count)
        ]

    def prompt(self, placeholders: int) -> list[int]:
        before, after = (self.random.integers(30, self.shapes.text.vocab_size, n).tolist() for n in (BEFORE, AFTER))
        return [*before, 20, *[IMAGE_ID] * placeholders, 21, *after]

    def requests(self, embeddings: Sequence[ImageEmbedding], new_tokens: int) -> list[Request]:
        return [
            Request(f"r{next(self.numbers)}", tuple(self.prompt(len(e.embeds))), SamplingParams(new_tokens), (e,))
            for e in embeddings
        ]


# --- one engine with pixels, and vLLM alone ----------------------------------------------------------------------------


def measure_mono(bed: Bed, part: str) -> None:
    """vLLM's `LLM`: its decoding given embeddings, TTFT and captions from pixels, its tower."""
    from vllm import LLM

    started = time.perf_counter()
    llm = LLM(
        str(bed.folder),
        dtype=str(bed.dtype).removeprefix("torch."),
        max_model_len=bed.config.max_length,
        max_num_seqs=bed.config.slots,
        gpu_memory_utilization=bed.config.gpu_memory,
        enable_mm_embeds=True,
        limit_mm_per_prompt={"image": 1},
        mm_processor_cache_gb=0,
        worker_extension_cls=f"{__name__}.TowerClock",
        **bed.options,
    )
    bed.row(part, "engine start", seconds=time.perf_counter() - started)
    try:
        for count in bed.bench.concurrency:
            with bed.report.guarded(f"{part} decode {count}"):
                decode = [_llm_decode(bed, llm, count) for _ in range(2)]
                bed.row(part, f"decode {count}", ms_per_step=min(decode), runs=[round(d, 3) for d in decode])
        with bed.report.guarded(f"{part} ttft"):
            times = [_llm_seconds(llm, _pixel_prompts(bed, 1), 1) * 1e3 for _ in range(10)][2:]
            bed.row(part, "ttft", ms=statistics.median(times), least=min(times), most=max(times))
        with bed.report.guarded(f"{part} tower"):
            (rate,) = llm.collective_rpc("tower_rate", args=(BATCH, *bed.grid))
            bed.row(part, "tower", images_per_s=rate)
        with bed.report.guarded(f"{part} captions"):
            prompts = _pixel_prompts(bed, bed.bench.images)
            seconds = _llm_seconds(llm, prompts, bed.bench.new_tokens)
            bed.row(part, "captions", images_per_s=len(prompts) / seconds, seconds=seconds)
    finally:
        llm.llm_engine.engine_core.shutdown()


def _pixel_prompts(bed: Bed, count: int) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": bed.prompt(1), "multi_modal_data": {"image": image}} for image in bed.images(count)]


def _llm_decode(bed: Bed, llm: Any, count: int) -> float:
    """Milliseconds a step, without the prompts' share."""
    from artemis_vlm.engines.vllm import vllm_prompt

    def seconds(new_tokens: int) -> float:
        requests = bed.requests(bed.embeddings(count), new_tokens)
        return _llm_seconds(llm, [vllm_prompt(request, IMAGE_ID) for request in requests], new_tokens)

    return _per_step(seconds, bed.bench.new_tokens)


def _llm_seconds(llm: Any, prompts: list[dict[str, Any]], new_tokens: int) -> float:
    from vllm import SamplingParams as Sampling

    started = time.perf_counter()
    sampling = Sampling(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    lengths = {len(output.outputs[0].token_ids) for output in outputs}
    assert lengths == {new_tokens}, f"answers of {lengths} tokens; {new_tokens} were asked for"
    return seconds


def _per_step(seconds: Callable[[int], float], new_tokens: int) -> float:
    seconds(2)
    first = statistics.median(seconds(1) for _ in range(3))
    return (seconds(new_tokens) - first) / (new_tokens - 1) * 1e3


class TowerClock:
    """Joins vLLM's worker, which has the tower: vLLM's own way to run something there, by name."""

    def tower_rate(self, batch: int, rows: int, columns: int) -> float:
        """Images/s of tower and projector, pixels on the device already."""
        model: Any = self.get_model()  # type: ignore[attr-defined]
        weight = model.visual.patch_embed.proj.weight
        pixels = torch.randn(batch * rows * columns, weight[0].numel(), device=weight.device, dtype=weight.dtype)
        grid = torch.tensor([[1, rows, columns]] * batch)

        def once() -> None:
            model.multi_modal_projector(model.visual(pixels, grid_thw=grid))

        with torch.inference_mode():
            return batch / _median_seconds(once, weight.device)


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(7):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


# --- encoder and decoder apart -----------------------------------------------------------------------------------------


def measure_separate(bed: Bed, part: str) -> None:
    """`VllmEngine` and `ImageEncoder`: the same figures, with their ratio to vLLM's own where those are there."""
    encoder = random_encoder(bed)
    if part == "separate":
        with bed.report.guarded(f"{part} tower"):
            measure_encoder(bed, encoder, part)
    with _engine(bed, part) as engine, asyncio.Runner() as loop:
        for count in bed.bench.concurrency:
            with bed.report.guarded(f"{part} decode {count}"):
                for how, answer in (("", _answer), (", streamed", _stream)):
                    decode = [_engine_decode(bed, engine, loop, count, answer) for _ in range(2)]
                    beside, runs = f"decode {count}", [round(d, 3) for d in decode]
                    _beside(bed, part, beside + how, "ms_per_step", min(decode), beside=beside, runs=runs)
        with bed.report.guarded(f"{part} ttft"):
            times = [loop.run(_ttft(bed, engine, encoder)) * 1e3 for _ in range(10)][2:]
            _beside(bed, part, "ttft", "ms", statistics.median(times), least=min(times), most=max(times))
        with bed.report.guarded(f"{part} captions"):
            images = bed.images(bed.bench.images)
            seconds = loop.run(_timed(_captions(bed, engine, encoder, images)))
            _beside(bed, part, "captions", "images_per_s", len(images) / seconds, seconds=seconds)


@contextmanager
def _engine(bed: Bed, part: str) -> Iterator[Any]:
    from artemis_vlm.engines.vllm import VllmEngine

    _wait_for_memory(bed)
    config = replace(bed.config, quantization="fp8" if part == "fp8" else "none")
    started = time.perf_counter()
    engine = VllmEngine.load(bed.folder, config, bed.dtype, bed.device.type, **bed.options)
    bed.row(part, "engine start", seconds=time.perf_counter() - started)
    try:
        yield engine
    finally:
        bed.row(part, "engine", busy_s=engine.stats().busy_s, steps=engine.stats().steps)
        engine.close()


def _wait_for_memory(bed: Bed) -> None:
    """Until the card has what an engine takes: the last one's process gives it back a moment after its end."""
    for _ in range(60 if bed.device.type == "cuda" else 0):
        free, total = torch.cuda.mem_get_info(bed.device)
        if free > bed.config.gpu_memory * total:
            return
        time.sleep(0.5)


def _beside(bed: Bed, part: str, what: str, figure: str, value: float, beside: str = "", **more: Any) -> None:
    other = bed.found("mono", beside or what, figure)
    # of rates ours by the other, of times the other by ours: above 1 is faster, either way
    ratio = {} if not other else {"of_vllm_alone": value / other if figure == "images_per_s" else other / value}
    bed.row(part, what, **{figure: value}, **ratio, **more)


def random_encoder(bed: Bed) -> ImageEncoder:
    """Tower and projector at the bed's shapes, made where they stay; it keeps no embedding, so each image is computed."""
    torch.manual_seed(0)
    with torch.device(bed.device), no_init_weights():
        tower = Qwen3VLVisionModel._from_config(Qwen3VLVisionConfig(**bed.shapes.vision), dtype=bed.dtype)
        projector = ArtemisVLMProjector(tower.config.out_hidden_size, bed.shapes.text.hidden_size).to(bed.dtype)
    with torch.no_grad():
        for parameter in (*tower.parameters(), *projector.parameters()):
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
            else:
                parameter.fill_(0.1)
    tower.deepstack_visual_indexes = []
    tower, projector = (module.requires_grad_(False).eval() for module in (tower, projector))
    return ImageEncoder(tower, projector, bed.spec, cache_bytes=0)


def measure_encoder(bed: Bed, encoder: ImageEncoder, part: str) -> None:
    """Images/s from patches to embeddings, both on the host; and of the computation by itself."""
    patches = [patchify(image, bed.spec) for image in bed.images(BATCH)]

    def whole() -> None:
        encoder.encode([(f"p{next(bed.numbers)}", p) for p in patches])

    pixels = torch.from_numpy(np.concatenate([p.pixels for p in patches])).to(bed.device)
    grid = torch.tensor([(1, *p.grid) for p in patches], device=bed.device)
    size = len(patches[0].pixels)
    ends = torch.arange(0, len(pixels) + 1, size, dtype=torch.int32, device=bed.device)

    def computed() -> None:
        with torch.inference_mode():
            encoder.project(pixels, grid, ends, size)

    _beside(bed, part, "tower", "images_per_s", BATCH / _median_seconds(computed, bed.device))
    bed.row(part, "encoder, host to host", images_per_s=BATCH / _median_seconds(whole, bed.device))
    started = time.perf_counter()
    for image in bed.images(BATCH):
        patchify(image, bed.spec)
    bed.row(part, "patchify, one core", images_per_s=BATCH / (time.perf_counter() - started))


async def _timed(work: Awaitable[object]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


async def _answer(engine: Any, request: Request) -> None:
    done = await complete(engine, request)
    assert len(done.token_ids) == request.sampling.max_tokens, f"{len(done.token_ids)} tokens, {done.finish_reason}"


async def _stream(engine: Any, request: Request) -> None:
    async for _ in engine.generate(request):
        pass


def _engine_decode(
    bed: Bed, engine: Any, loop: asyncio.Runner, count: int, answer: Callable[[Any, Request], Awaitable[None]]
) -> float:
    async def together(requests: list[Request]) -> None:
        await asyncio.gather(*(answer(engine, request) for request in requests))

    def seconds(new_tokens: int) -> float:
        return loop.run(_timed(together(bed.requests(bed.embeddings(count), new_tokens))))

    return _per_step(seconds, bed.bench.new_tokens)


async def _ttft(bed: Bed, engine: Any, encoder: ImageEncoder) -> float:
    """From an RGB image to its first token."""
    (image,) = bed.images(1)
    started = time.perf_counter()
    embeddings = await asyncio.to_thread(lambda: encoder.encode([(f"p{next(bed.numbers)}", patchify(image, bed.spec))]))
    (request,) = bed.requests(embeddings, 1)
    async for _ in engine.generate(request):
        return time.perf_counter() - started
    raise AssertionError("an answer without a token")


async def _captions(bed: Bed, engine: Any, encoder: ImageEncoder, images: Sequence[Image.Image]) -> None:
    """All images to captions: the encoder works through batches in a thread while the engine decodes what is there."""

    def encode(batch: Sequence[Future[Patches]]) -> list[ImageEmbedding]:
        return encoder.encode([(f"p{next(bed.numbers)}", patches.result()) for patches in batch])

    answers = []
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        cut = [pool.submit(patchify, image, bed.spec) for image in images]
        for at in range(0, len(cut), BATCH):
            embeddings = await asyncio.to_thread(encode, cut[at : at + BATCH])
            for request in bed.requests(embeddings, bed.bench.new_tokens):
                answers.append(asyncio.create_task(_answer(engine, request)))
        await asyncio.gather(*answers)
