"""The recipe of a projector-only run: every value that decides its result, and the named runs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch

from artemis_vlm.errors import RunError
from artemis_vlm.frozen import compute_dtype
from artemis_vlm.linear import PRECISIONS

#: Where eval loss is taken when `eval_every` is 0, and what the report shows, as shares of all steps.
EVAL_SHARES: Final = (0.0, 0.05, 0.20, 0.50, 0.75, 0.90, 1.0)

#: Fields in which 0 means none, or what suits the run.
AT_LEAST_ZERO: Final = (
    "max_steps", "weight_decay", "clip_norm", "eval_every", "save_every", "captions", "max_bad_share",
    "threads", "decode_workers",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A projector-only run. The named runs below are values of it; the command line overrides fields."""

    tower: str = ""
    """Vision tower: a Qwen3-VL checkpoint, a tower alone, or an A3; folder, s3:// URI or hub id."""
    decoder: str = ""
    """Text decoder with its tokenizer and chat template; folder, s3:// URI or hub id."""
    data: str = ""
    """BLIP3o-style tar shards, parquet or a saved dataset; folder, glob, s3:// URI, hf:// URI or hub dataset id."""
    eval_data: str = ""
    """Separate evaluation data; empty: the first `held_out` of `data`, which training skips."""
    output: str = ""
    """Where checkpoints, metrics and the model go; folder or s3:// URI. The same output continues the run."""

    samples: int = 1_000_000
    """Samples of one pass, held-out ones included; they fix the number of steps."""
    held_out: int = 1_000
    """Samples kept for evaluation, from `eval_data` if given, else from `data`."""
    batch_size: int = 32
    """Samples a step, exactly, over all workers and micro-batches."""
    max_steps: int = 0
    """Steps of the cosine; 0: ceil((samples - held_out) / batch_size)."""
    learning_rate: float = 1e-3
    """Peak, reached after warm-up; cosine to 0."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    clip_norm: float = 1.0
    """Gradient norm above which the gradient is scaled down; 0: never."""
    seed: int = 0
    """Decides the projector's first weights and the data order."""
    prompt: str = "Describe this image in detail."
    """What the user says beside each image."""
    min_pixels: int = 32 * 32
    """Smaller images are enlarged to this area, in pixels."""
    max_pixels: int = 512 * 512
    """Larger images are reduced to this area, in pixels."""
    max_tokens: int = 2048
    """Longer samples are quarantined."""
    dtype: str = "bfloat16"
    """Of the frozen parts and of all computing: bfloat16, float32, or auto: bfloat16 except on CPUs without it; of a run
    that continues what it began in. The projector's weights and moments are float32."""
    frozen_precision: str = "dtype"
    """Of the decoder's linear layers while training: `dtype`; `fp8-backward`, the gradient's products in 8 bits; or `fp8`,
    all of them. The export is not touched."""

    eval_every: int = 0
    """Steps between evaluations; 0: at 0, 5, 20, 50, 75, 90 and 100 % of the steps."""
    save_every: int = 0
    """Steps between checkpoints; 0: twenty a run."""
    keep: int = 3
    """Newest checkpoints kept, beside the best."""
    captions: int = 8
    """Held-out images captioned before and after, for the report."""
    max_bad_share: float = 0.01
    """Share of unusable samples that stops the run."""
    export: str = "model"
    """`model`: a whole A3 folder at the end; `projector`: only the projector and the names of its sources."""

    workers: int = 1
    """Training processes, one GPU each where there are GPUs; 0: as many as GPUs, without any two."""
    micro_tokens: int = 0
    """Most tokens of one micro-batch, beyond a single sample; 0: what fits at step 0, kept when a run continues."""
    threads: int = 0
    """CPU threads of a training process without a GPU; 0: the machine's cores over its workers."""
    worker_label: str = ""
    """`key=value` of the nodes that may train, such as `a3/role=gb10`."""
    decode_workers: int = 0
    """Processes that decode images; 0: from the cluster's CPUs."""

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "keep", "max_tokens", "min_pixels", "max_pixels"):
            if getattr(self, name) < 1:
                raise RunError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in AT_LEAST_ZERO:
            if not 0 <= getattr(self, name) < math.inf:  # nor is it NaN
                raise RunError(f"{name} is {getattr(self, name)}; expected a finite number of at least 0")
        if not 0 < self.learning_rate < math.inf:
            raise RunError(f"learning_rate is {self.learning_rate}; expected a finite number above 0")
        if self.workers < 0:
            raise RunError(f"workers is {self.workers}; expected at least 1, or 0 for what suits the cluster")
        if self.micro_tokens < 0:
            raise RunError(f"micro_tokens is {self.micro_tokens}; expected at least 1, or 0 for what fits the memory")
        if not 0 <= self.held_out < self.samples:
            raise RunError(f"held_out is {self.held_out} of {self.samples} samples; something must be left to train on")
        if self.workers > self.batch_size:
            raise RunError(f"{self.workers} workers share a step of {self.batch_size} samples; each needs at least one")
        if not 0 <= self.warmup < 1:
            raise RunError(f"warmup is {self.warmup}; it is a share of the steps, at least 0 and below 1")
        if self.dtype not in ("bfloat16", "float32", "auto"):
            raise RunError(f"dtype is {self.dtype}; expected bfloat16, float32 or auto")
        if self.frozen_precision not in PRECISIONS:
            raise RunError(f"frozen_precision is {self.frozen_precision}; expected {', '.join(PRECISIONS)}")
        if self.export not in ("model", "projector"):
            raise RunError(f"export is {self.export}; expected model or projector")
        if self.worker_label and "=" not in self.worker_label:
            raise RunError(f"worker_label is {self.worker_label}; expected key=value")

    @property
    def steps(self) -> int:
        return self.max_steps or math.ceil((self.samples - self.held_out) / self.batch_size)

    @property
    def eval_steps(self) -> frozenset[int]:
        shares = {round(share * self.steps) for share in EVAL_SHARES}
        return frozenset(shares | set(range(0, self.steps, self.eval_every)) if self.eval_every else shares)

    @property
    def aim_steps(self) -> int:
        """After how many updates fp8 finds its directions anew."""
        return max(1, self.steps // 20)

    @property
    def save_steps(self) -> int:
        return self.save_every or max(1, self.steps // 20)

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        return compute_dtype(device) if self.dtype == "auto" else getattr(torch, self.dtype)

    def fingerprint(self) -> dict[str, Any]:
        """The fields that decide the result: a run continues only where they are equal.

        What is read counts by its content and not by where it is, so models and data are compared elsewhere.
        """
        places = {"tower", "decoder", "data", "eval_data", "output"}
        free = {"keep", "captions", "workers", "worker_label", "decode_workers", "save_every", "max_bad_share"}
        free |= {"export", "threads", "micro_tokens", "dtype"}  # the last three are the checkpoint's, see `restore`
        fields = {k: v for k, v in asdict(self).items() if k not in places | free}
        return fields | {"steps": self.steps}


#: The published A3 (its card's "~0.5 %" held out does not fit its 31,219 steps; 1,000 samples do).
A3: Final = TrainConfig(eval_every=780, save_every=780, worker_label="a3/role=gb10")
#: The published A3-preview.
A3_PREVIEW: Final = replace(A3, samples=25_000, held_out=250, batch_size=8, warmup=0.0, eval_every=0, save_every=200)

#: Minutes on two cores; jobs/train_a3.py fills in the embedded decoder, tower and images. Steps are small because so few
#: samples do most in many of them: 608 end at 2.06, 1.85 and 1.81 with (4, 3e-3), (4, 6e-3) and (2, 4e-3), and only the
#: last clearly looks at the image.
DEMO: Final = TrainConfig(
    samples=640,
    held_out=32,
    batch_size=2,
    learning_rate=4e-3,
    max_pixels=320 * 320,
    dtype="auto",
    workers=0,
    save_every=120,
    micro_tokens=4096,
)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the update after `step` updates: linear warm-up, then cosine to 0 at the last step."""
    warmup_steps = math.ceil(config.warmup * config.steps)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, config.steps - warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
