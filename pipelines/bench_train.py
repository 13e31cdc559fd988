"""What a projector training step costs on this machine, beside the limit of its matrix products and the published recipe.

Random weights in the full shapes, made on the device; random pixels and ids. Needs torch, transformers and pyarrow, no Ray:
the loop is `align.run`, its feed a list in memory. Each variant is tried by itself, so one that fails leaves the others.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.initialization import no_init_weights
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from artemis_vlm import frozen
from artemis_vlm.configuration import ArtemisVLMConfig
from artemis_vlm.examples import Example
from artemis_vlm.frozen import attend, unpacked_attention
from artemis_vlm.image import ImageSpec
from artemis_vlm.modeling import ArtemisVLMForConditionalGeneration, normalize, repeat_frame
from pipelines import align
from pipelines.align import Alignment
from pipelines.bench_shapes import SHAPES, Report, Shapes, collect, hardware
from pipelines.data import Step, never, split
from pipelines.recipe import TrainConfig

SPEC: Final = ImageSpec()
IMAGE_ID: Final = 22
#: Above every token id.
TOP_ID = 131_072
#: Tokens before the image and between image and caption.
BEFORE, AFTER = 5, 12
PUBLISHED_BATCH: Final = 2
#: Between the packed gradient and that of Transformers' own layers in bfloat16, on random weights, which amplify what
#: 40 layers round: 0.992 and 0.709 were seen on an H100. A gradient that is not this one's has about 0.
MIN_COSINE: Final = {"bf16": 0.95, "fp8-backward": 0.7, "fp8": 0.5}
#: Of a sample here, so that with its padding the kernels are told 1,024.
MAX_TOKENS: Final = 897


@dataclass(frozen=True)
class Mix:
    """What samples look like: grids of patches, each as likely, and captions of normal lengths, cut off on both sides."""

    name: str
    grids: Sequence[tuple[int, int]]
    caption: tuple[float, float]
    bounds: tuple[float, float]

    def examples(self, count: int) -> list[Example]:
        """The same ones every time."""
        lengths, content = torch.Generator().manual_seed(1), np.random.default_rng(1)
        return [self._example(f"{self.name}/{i}", lengths, content) for i in range(count)]

    def _example(self, uid: str, lengths: torch.Generator, content: np.random.Generator) -> Example:
        grid = self.grids[int(torch.randint(len(self.grids), (1,), generator=lengths))]
        n_targets = int(torch.clamp(torch.normal(*self.caption, (1,), generator=lengths), *self.bounds))
        n_patches = grid[0] * grid[1]
        before, after, target = (content.integers(TOP_ID // 2, TOP_ID, n) for n in (BEFORE, AFTER, n_targets))
        ids = np.concatenate([before, np.full(n_patches // 4, IMAGE_ID), after, target]).astype(np.int32)
        patches = content.integers(0, 256, (n_patches, SPEC.patch_bytes), dtype=np.uint8)
        return Example(uid, ids, len(ids) - n_targets, patches, grid)


#: 512x512 pixels in several aspect ratios and long captions: 445 tokens; and images and captions as BLIP3o has them: 290.
MIXES: Final = (
    Mix("512x512", ((32, 32), (26, 38), (38, 26), (28, 36), (36, 28), (24, 42)), (180.0, 50.0), (40, 400)),
    Mix("blip3o-like", ((24, 24), (20, 28), (28, 20), (22, 28), (26, 28), (20, 24), (28, 28)), (120.0, 35.0), (30, 300)),
)


@dataclass(frozen=True)
class Settings:
    """Of one run of the benchmark."""

    shapes: str = "a3"
    precisions: Sequence[str] = ("bf16", "fp8-backward", "fp8")
    baseline: bool = False
    profile: bool = False
    json_file: str = ""
    batch_size: int = 32
    steps: int = 8


def run(settings: Settings) -> int:
    """Measures and prints; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report()
    peak, sustained = (matmul_peak(device, repeats) for repeats in (20, 1000))
    about = hardware(device) | {"matmul_peak_tflops": round(peak, 3), "matmul_sustained_tflops": round(sustained, 3)}
    about |= {"shapes": settings.shapes}
    print(json.dumps(about), flush=True)
    model = random_model(SHAPES[settings.shapes], device)
    print(f"model made in {time.perf_counter() - started:.0f} s", flush=True)
    count = settings.batch_size * max(1, min(settings.steps, 4))
    samples = {mix.name: mix.examples(count) for mix in MIXES}
    for name, examples in samples.items():
        mean, work = np.mean([e.n_tokens for e in examples]), useful_flops(model, examples) / count
        print(
            f"samples {name}: {mean:.0f} tokens, {work / 1e12:.2f} TFLOP each; limit {peak * 1e12 / work:.1f} samples/s, "
            f"{sustained * 1e12 / work:.1f} at the rate that products keep up",
            flush=True,
        )
    reference = None
    with report.guarded("reference gradient"):
        reference = plain_gradient(model, samples[MIXES[0].name][:2])
    if settings.baseline:
        with report.guarded("baseline"):
            examples = samples[MIXES[0].name][: min(count, 64)]
            report.rows.append(measure_published(model, examples, settings, peak))
    for precision in settings.precisions:
        with report.guarded(precision):
            measure_packed(model, precision, samples, settings, peak, reference, report)
    print_table(report.rows)
    print(f"whole benchmark {time.perf_counter() - started:.0f} s; failures: {report.failures or 'none'}", flush=True)
    if settings.json_file:
        Path(settings.json_file).write_text(
            json.dumps({"about": about, "rows": report.rows, "failures": report.failures}, indent=1) + "\n"
        )
    return 1 if report.failures else 0


# --- what is measured on ---------------------------------------------------------------------------------------------


def matmul_peak(device: torch.device, repeats: int) -> float:
    """TFLOP/s of a large square bfloat16 product; many of them bring a GPU to its power limit, and to lower clocks."""
    size, repeats = (8192, repeats) if device.type == "cuda" else (512, 2)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = timed(lambda: a @ b, device, repeats)
    return 2 * size**3 / seconds / 1e12


def timed(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds a call, after a warm-up as long as the measurement."""
    for _ in range(2):
        _wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        _wait(device)
        seconds = (time.perf_counter() - started) / repeats
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_model(shapes: Shapes, device: torch.device) -> ArtemisVLMForConditionalGeneration:
    """Frozen bfloat16 parts and a float32 projector, made where they stay."""
    torch.manual_seed(0)
    vision = Qwen3VLVisionConfig(**shapes.vision)
    config = ArtemisVLMConfig(vision.to_dict(), shapes.text.to_dict(), image_turn_thinking=False)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device), no_init_weights():
            tower = Qwen3VLVisionModel(config.vision_config)
            decoder = transformers.AutoModelForCausalLM.from_config(config.text_config)
            model = ArtemisVLMForConditionalGeneration(config, vision_model=tower, language_model=decoder)
    finally:
        torch.set_default_dtype(default)
    model.multi_modal_projector.float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.02)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    model.set_training_stage("stage1")
    return model.eval()  # type: ignore[no-any-return]


def useful_flops(model: ArtemisVLMForConditionalGeneration, examples: Sequence[Example]) -> float:
    """Of forward and backward, without the gradients of frozen weights; logits and attention only where they count."""
    decoder, vision = model.language_model, model.config.vision_config
    layers = decoder.get_decoder().layers
    in_layers = sum(m.weight.numel() for layer in layers for m in layer.modules() if isinstance(m, nn.Linear))
    head = decoder.get_output_embeddings().weight.numel()
    in_tower = sum(p.numel() for p in model.visual.blocks.parameters())
    in_projector = sum(p.numel() for p in model.multi_modal_projector.parameters() if p.ndim > 1)
    width = model.config.text_config.num_attention_heads * layers[0].self_attn.head_dim
    total = 0.0
    for example in examples:
        tokens, patches = example.n_tokens, example.grid[0] * example.grid[1]
        total += 4 * in_layers * tokens + 4 * head * example.n_targets + 6 * in_projector * (patches // 4)
        total += 2 * in_tower * patches + 4 * vision.depth * patches**2 * vision.hidden_size
        total += len(layers) * 4 * tokens**2 * width  # causal: half of forward's and backward's
    return total


class Endless:
    """A feed of the same samples again and again, in steps."""

    def __init__(self, examples: Sequence[Example], batch_size: int, micro_tokens: int) -> None:
        self.examples, self.batch_size, self.micro_tokens = itertools.cycle(examples), batch_size, micro_tokens

    def next(self, stopping: Callable[[], bool] = never) -> Step:
        chosen = list(itertools.islice(self.examples, self.batch_size))
        targets = sum(e.n_targets for e in chosen)
        return Step(split(chosen, 1, self.micro_tokens)[0], targets, [e.uid for e in chosen], {}, {})


# --- the packed loop -------------------------------------------------------------------------------------------------


def measure_packed(
    model: ArtemisVLMForConditionalGeneration,
    precision: str,
    samples: dict[str, list[Example]],
    settings: Settings,
    peak: float,
    reference: tuple[float, torch.Tensor] | None,
    report: Report,
) -> None:
    """`align.run` in one precision, on each mix of samples."""
    config = TrainConfig(
        batch_size=settings.batch_size,
        max_steps=10**6,
        held_out=0,
        max_tokens=MAX_TOKENS,
        frozen_precision="dtype" if precision == "bf16" else precision,
        eval_every=10**7,
        save_every=10**7,
    )
    started = time.perf_counter()
    alignment = Alignment(model, SPEC, config)
    _wait(alignment.device)
    print(
        f"{precision}: ready in {time.perf_counter() - started:.0f} s, micro-batches of up to "
        f"{alignment.state['micro_tokens']} tokens, compiled {alignment.packed.compile_it}",
        flush=True,
    )
    if reference is not None:
        with report.guarded(f"{precision} gradient"):
            compare_gradients(precision, alignment, samples[MIXES[0].name][:2], reference)
    for name, examples in samples.items():
        with report.guarded(f"{precision} {name}"):
            report.rows.append(measure_loop(alignment, f"{precision}, {name}", examples, settings, peak))
    if settings.profile:
        with report.guarded(f"{precision} parts"):
            print_parts(alignment, samples[MIXES[0].name][: settings.batch_size])
        with report.guarded(f"{precision} profile"):
            print_profile(alignment, samples[MIXES[0].name][: settings.batch_size])


def measure_loop(
    alignment: Alignment, name: str, examples: Sequence[Example], settings: Settings, peak: float
) -> dict[str, Any]:
    """One row of the table: `settings.steps` steps after two that are not counted."""
    device, records, marks = alignment.device, list[dict[str, Any]](), list[float]()
    feed = Endless(examples, settings.batch_size, alignment.state["micro_tokens"])
    warm = min(2, settings.steps)
    alignment.state["evaluated"] = alignment.step  # there is nothing to evaluate on
    collect()
    graphs = 0
    for _ in align.run(alignment, feed, list, on_record=records.append, save=lambda _: None):
        marks.append(time.perf_counter())
        if len(marks) == warm:
            graphs = compiled_graphs()
        if len(marks) == warm + settings.steps:
            break
    _wait(device)
    seconds = (marks[-1] - marks[warm - 1]) / settings.steps
    measured = records[warm:]
    for record in records:
        if not math.isfinite(record["loss"]):
            raise ArithmeticError(f"loss {record['loss']} at step {record['step']}")
    step = feed.next()
    batches = alignment.load(step).batches
    computed, used = sum(len(b.input_ids) for b in batches), sum(b.n_tokens for b in batches)
    per_step = useful_flops(alignment.model, examples) * settings.batch_size / len(examples)
    row = table_row(name, settings.batch_size / seconds, used / seconds, per_step / seconds / 1e12, peak)
    row |= {
        "loss": round(measured[-1]["loss"], 3),
        "micro_batches": len(batches),
        "useful_tokens": round(used / computed, 4),
        "data_wait": round(float(np.mean([r["data_wait"] for r in measured])), 5),
        "compiled_after_warm_up": compiled_graphs() - graphs,
    }
    print(json.dumps(row), flush=True)
    return row


def table_row(name: str, samples: float, tokens: float, tflops: float, peak: float) -> dict[str, Any]:
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {
        "name": name,
        "samples_per_s": round(samples, 3),
        "tokens_per_s": round(tokens),
        "tflops": round(tflops, 2),
        "of_peak": round(tflops / peak, 4),
        "memory_gib": round(memory, 1),
    }


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"ROW {row['name']:34s} {row['samples_per_s']:8.2f} samples/s {row['tokens_per_s']:8d} tokens/s "
            f"{row['tflops']:7.1f} TFLOP/s {row['of_peak']:6.1%} of peak  {row['memory_gib']:5.1f} GiB  "
            f"data wait {row.get('data_wait', 0):.2%}  useful {row.get('useful_tokens', 0):.1%}",
            flush=True,
        )


# --- the published recipe --------------------------------------------------------------------------------------------


def padded_inputs(model: ArtemisVLMForConditionalGeneration, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """A right-padded batch in the public format: both frames of each patch, labels -100 off the target."""
    device = model.multi_modal_projector.fc1.weight.device
    longest = max(e.n_tokens for e in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        n, given = example.n_tokens, torch.from_numpy(example.input_ids.astype(np.int64))
        ids[row, :n], mask[row, :n] = given, 1
        labels[row, example.n_prompt : n] = given[example.n_prompt :]
    pixels = normalize(torch.from_numpy(np.concatenate([e.patches for e in examples])), SPEC)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    inputs["pixel_values"] = repeat_frame(pixels, SPEC.temporal_patch_size, model.visual)
    inputs["image_grid_thw"] = torch.tensor([(1, *e.grid) for e in examples])
    return {k: v.to(device) for k, v in inputs.items()}


def measure_published(
    model: ArtemisVLMForConditionalGeneration, examples: Sequence[Example], settings: Settings, peak: float
) -> dict[str, Any]:
    """Batches of two, right-padded, all logits through Transformers' own loss; an update every `batch_size` samples."""
    device = model.multi_modal_projector.fc1.weight.device
    parameters = list(model.multi_modal_projector.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def pass_over(chosen: Sequence[Example]) -> None:
        for at in range(0, len(chosen), PUBLISHED_BATCH):
            model(**padded_inputs(model, chosen[at : at + PUBLISHED_BATCH])).loss.backward()
            if (at + PUBLISHED_BATCH) // settings.batch_size > at // settings.batch_size:
                optimizer.step()
                optimizer.zero_grad()

    before = {k: v.clone() for k, v in model.multi_modal_projector.state_dict().items()}
    collect()
    with unpacked_attention(model.visual, model.language_model):
        pass_over(examples[:8])
        _wait(device)
        started = time.perf_counter()
        pass_over(examples)
        _wait(device)
    seconds = time.perf_counter() - started
    model.multi_modal_projector.load_state_dict(before)
    optimizer.zero_grad()
    tokens, work = sum(e.n_tokens for e in examples), useful_flops(model, examples) / 1e12
    row = table_row("published recipe", len(examples) / seconds, tokens / seconds, work / seconds, peak)
    print(json.dumps(row), flush=True)
    return row


def plain_gradient(model: ArtemisVLMForConditionalGeneration, examples: Sequence[Example]) -> tuple[float, torch.Tensor]:
    """Mean loss of a few samples and its projector gradient by Transformers' own layers."""
    with unpacked_attention(model.visual, model.language_model):
        loss = model(**padded_inputs(model, examples)).loss
        gradients = torch.autograd.grad(loss, list(model.multi_modal_projector.parameters()))
    return loss.item(), torch.cat([g.flatten() for g in gradients])


def compare_gradients(
    precision: str, alignment: Alignment, examples: Sequence[Example], reference: tuple[float, torch.Tensor]
) -> None:
    """Prints how far the packed loss and gradient are from those of Transformers' own layers."""
    batch = alignment.pack(examples).to(alignment.device)
    if alignment.packed.directions:  # the loop finds them at its first step
        alignment.packed.take_directions(alignment.packed.find_directions(batch))
    loss = alignment.packed.loss(batch) / batch.n_targets
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, alignment.parameters)])
    cosine = F.cosine_similarity(gradient, reference[1], 0).item()
    print(
        f"{precision} beside transformers' own layers in bf16: loss {loss.item():.5f} and {reference[0]:.5f}, gradient "
        f"cosine {cosine:.5f}, norms {gradient.norm().item():.4g} and {reference[1].norm().item():.4g}",
        flush=True,
    )
    if not math.isfinite(loss.item()) or not cosine > MIN_COSINE[precision]:
        raise ArithmeticError(f"{precision}: the packed gradient is not that of transformers' own layers (cosine {cosine})")


# --- where the time goes ---------------------------------------------------------------------------------------------


def print_parts(alignment: Alignment, examples: Sequence[Example]) -> None:
    """Milliseconds a sample of a step's parts, each measured by itself, and of attention's variants."""
    device, packed = alignment.device, alignment.packed
    feed = Endless(examples, len(examples), alignment.state["micro_tokens"])
    batch = alignment.load(feed.next()).batches[0]
    _wait(device)
    n, decoder = len(batch.uids), alignment.model.language_model
    states = torch.randn(batch.n_targets, decoder.config.hidden_size, device=device, dtype=decoder.dtype).requires_grad_()
    head = decoder.get_output_embeddings().weight

    def head_loss() -> None:
        frozen.frozen_head_cross_entropy(states, head, batch.targets, compile_it=packed.compile_it).backward()  # type: ignore[no-untyped-call]

    def whole() -> None:
        packed.loss(batch).backward()  # type: ignore[no-untyped-call]

    def forward() -> None:
        with torch.no_grad():
            packed.loss(batch)

    parts: dict[str, Callable[[], Any]] = {
        "tower": lambda: packed.features(batch),
        "loss head, forward and backward": head_loss,
        "forward without gradients": forward,
        "forward and backward": whole,
    }
    if device.type == "cuda":
        parts |= attention_variants(alignment, batch.cu_seqlens, batch.cu_patches, len(batch.input_ids), len(batch.patches))
    for name, call in parts.items():
        try:
            print(f"PART {name:44s} {timed(call, device, 3) * 1e3 / n:8.3f} ms a sample", flush=True)
        except Exception as error:  # a variant that this torch lacks is an answer, not a failure of the benchmark
            print(f"PART {name:44s} not here: {type(error).__name__}: {str(error)[:160]}", flush=True)
    alignment.optimizer.zero_grad(set_to_none=True)
    alignment.packed.model.zero_grad(set_to_none=True)


def attention_variants(
    alignment: Alignment, samples: torch.Tensor, images: torch.Tensor, n_tokens: int, n_patches: int
) -> dict[str, Callable[[], Any]]:
    """All layers' attention of one micro-batch, forward and backward, in each way that `attend` has."""
    heads, layers = alignment.packed.heads, len(alignment.packed.layers)
    max_length = alignment.packed.max_length

    def leaves(rows: int, *numbers: int) -> list[torch.Tensor]:
        made = [torch.randn(rows, n, heads.size, device=samples.device, dtype=torch.bfloat16) for n in numbers]
        return [t.requires_grad_() for t in made]

    def decoder(attention: Callable[..., torch.Tensor], way: str) -> Callable[[], None]:
        q, k, v = leaves(n_tokens, heads.query, heads.key, heads.key)

        def call() -> None:
            chosen, frozen._VARLEN = frozen._VARLEN, way
            try:
                for _ in range(layers):
                    out = attention(q, k, v, samples, samples, max_length, True, None)
                    torch.autograd.grad(out, (q, k, v), out.detach())
            finally:
                frozen._VARLEN = chosen

        return call

    def tower() -> None:
        count = alignment.packed.tower.heads
        size = alignment.model.config.vision_config.hidden_size // count
        q = torch.randn(n_patches, count, size, device=images.device, dtype=torch.bfloat16)
        for _ in alignment.packed.tower.blocks:
            attend(q, q, q, images, images, alignment.packed.tower.max_patches, causal=False)

    ways = {f"torch, grouped heads {way}": decoder(frozen._varlen, way) for way in ("named", "unnamed", "repeated")}
    ways |= {"cuDNN": decoder(frozen._cudnn_varlen, frozen._VARLEN)}
    return {**{f"decoder attention, {name}": call for name, call in ways.items()}, "tower attention": tower}


def print_profile(alignment: Alignment, examples: Sequence[Example]) -> None:
    """The kernels of one step that take longest, their sums by kind, and what waits for the device."""
    from torch.profiler import ProfilerActivity, profile

    feed = Endless(examples, len(examples), alignment.state["micro_tokens"])
    alignment.train_step(feed.next())
    _wait(alignment.device)
    on_gpu = alignment.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        alignment.train_step(feed.next())
        _wait(alignment.device)
    times = {e.key: float(e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in profiler.key_averages()}
    total = sum(times.values())
    kinds: dict[str, float] = {}
    for name, spent in times.items():
        kinds[kernel_kind(name)] = kinds.get(kernel_kind(name), 0.0) + spent
    for kind, spent in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"KIND {kind:24s} {spent / 1e3 / len(examples):8.3f} ms a sample {spent / total:6.1%}", flush=True)
    for name, spent in sorted(times.items(), key=lambda item: -item[1])[:30]:
        print(f"KERNEL {spent / 1e3 / len(examples):8.3f} ms a sample {spent / total:6.1%}  {name[:110]}", flush=True)
    if on_gpu:
        print_synchronisations(alignment, feed)


def kernel_kind(name: str) -> str:
    lower = name.lower()
    for kind, words in {  # the first that fits: fused kernels carry the names of what went into them
        "fused element-wise": ("triton", "_along", "_sum", "_rest", "_gate_gradient", "_rotary_gradient"),
        "attention": ("flash", "fmha", "attention", "cudnn"),
        "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "matmul", "scaled_mm", "addmm"),
        "optimizer": ("multi_tensor", "adam", "lpnorm"),
        "copies": ("memcpy", "memset", "copy"),
    }.items():
        if any(word in lower for word in words):
            return kind
    return "other"


def print_synchronisations(alignment: Alignment, feed: Endless) -> None:
    """What makes the host wait for the device between a step's first kernel and the reading of its loss."""
    loaded = alignment.load(feed.next())
    _wait(alignment.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            launched = alignment.launch(loaded)
            alignment.load(feed.next())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    alignment.conclude(launched)
    found = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    print(f"SYNCHRONISATIONS in a step: {len(found)} {sorted(set(found))}", flush=True)
