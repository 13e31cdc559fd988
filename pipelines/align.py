"""Projector-only alignment: the loop that carries out a recipe on one rank.

Knows nothing of Ray: it takes steps from any feed and talks to other ranks through torch.distributed alone, so it
runs the same under Ray Train, in a test, and on a bare GPU. A step is exactly `batch_size` samples; its loss is the
sum of token losses over the supervised tokens of the whole step, however it is cut into micro-batches and ranks.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist

from artemis_vlm.errors import RunError
from artemis_vlm.examples import Example, split_by_tokens
from artemis_vlm.image import ImageSpec
from artemis_vlm.modeling import ArtemisVLMForConditionalGeneration
from artemis_vlm.packed import PackedModel
from artemis_vlm.packing import PackedBatch, pack
from pipelines.checkpoint import Checkpoint
from pipelines.data import Counts, DataEnded, Feed, Step, never
from pipelines.recipe import TrainConfig, learning_rate

logger = logging.getLogger(__name__)

#: Steps in a row with a non-finite loss or gradient that stop a run.
MAX_SKIPPED_STEPS: Final = 3
#: Of a micro-batch where memory is not what limits it.
CPU_MICRO_TOKENS: Final = 8192
#: Of the memory that is free at step 0, how much micro-batches may take; less where the GPU's memory is the host's.
MEMORY_SHARE: Final = 0.85
UNIFIED_MEMORY_SHARE: Final = 0.5
#: Samples that the directions of products in 8 bits are found from.
AIM_SAMPLES: Final = 16


@dataclass(frozen=True, slots=True)
class LoadedStep:
    """A step whose batches are on the device, or on their way there.

    ready: what the device must wait for before it reads them
    """

    work: Step
    batches: Sequence[PackedBatch]
    ready: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step that the device is working on.

    work: None where this rank has none
    numbers: float32 (3,), the loss, the gradient's norm, and above 0 if some rank abandons the step
    done: when they will be there
    """

    work: Step | None
    numbers: torch.Tensor
    done: torch.cuda.Event | None

    def is_done(self) -> bool:
        return self.done is None or bool(self.done.query())  # type: ignore[no-untyped-call]


class Alignment:
    """The trained state of a run on one rank, and what can be done with it: step, evaluate, save, restore."""

    def __init__(
        self,
        model: ArtemisVLMForConditionalGeneration,
        spec: ImageSpec,
        config: TrainConfig,
        inputs: Mapping[str, Any] | None = None,
        *,
        compile_it: bool | None = None,
    ) -> None:
        """
        Args:
            inputs: what the run reads, by its content, as JSON; a checkpoint of other inputs is refused.
            compile_it: the frozen layers; None: where that pays.
        """
        self.model, self.spec, self.config = model, spec, config
        self.identity = config.fingerprint() | dict(inputs or {})
        self.step = 0
        self.parameters = list(model.multi_modal_projector.parameters())
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=config.weight_decay
        )
        self.packed = PackedModel(model, spec, config.max_tokens, precision=config.frozen_precision, compile_it=compile_it)
        gpu = self.device.type == "cuda"
        self._copies = torch.cuda.Stream(self.device) if gpu else None  # type: ignore[no-untyped-call]
        self.state: dict[str, Any] = {
            "position": None,
            "counts": asdict(Counts()),
            "micro_tokens": config.micro_tokens or self._fitting_tokens(),
            "skipped": 0,
            "skipped_in_row": 0,
            "evaluated": None,  # the step of the last evaluation
            "best": None,  # [eval loss, step]
            "unevaluated": None,  # the record of the last step, if its evaluation was abandoned
        }

    @property
    def dtype(self) -> str:
        """The frozen parts' dtype, in which everything is computed."""
        return str(self.model.language_model.dtype).removeprefix("torch.")

    @property
    def evaluation_due(self) -> bool:
        return self.step in self.config.eval_steps and self.state["evaluated"] != self.step

    @property
    def best_step(self) -> int | None:
        return self.state["best"][1] if self.state["best"] else None

    def _fitting_tokens(self) -> int:
        """Tokens of a micro-batch that fit the memory of every rank."""
        if self.device.type != "cuda":
            return CPU_MICRO_TOKENS
        fitting = torch.tensor(self._measured_tokens(), device=self.device)
        if dist.is_initialized():  # before anything is refused, so that every rank refuses it
            dist.all_reduce(fitting, dist.ReduceOp.MIN)
        tokens = int(fitting)
        if tokens < self.config.max_tokens:
            raise RunError(
                f"the memory that is free on each GPU fits {tokens} tokens; the longest sample may have "
                f"{self.config.max_tokens}: lower --max-tokens, free memory, or set --micro-tokens yourself"
            )
        return tokens

    def _measured_tokens(self) -> int:
        """Measured on a made-up micro-batch, which also compiles what there is to; 0 where not even that fits."""
        batch = self.pack([_made_up_example(self.spec, self.model.config.image_token_id, self.config.max_tokens)] * 4)
        try:
            batch = batch.to(self.device)
            self.packed.loss(batch).backward()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.packed.loss(batch).backward()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self.device)
        except torch.OutOfMemoryError as error:
            logger.warning("%d tokens at once do not fit the memory: %s", len(batch.input_ids), error)
            return 0
        a_token = (torch.cuda.max_memory_allocated(self.device) - before) / len(batch.input_ids)
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        unified = getattr(torch.cuda.get_device_properties(self.device), "is_integrated", False)
        tokens = int(free * (UNIFIED_MEMORY_SHARE if unified else MEMORY_SHARE) / a_token)
        logger.info(
            "a token takes %.1f MB of %.1f GB free of %.1f: micro-batches of %d tokens",
            *(a_token / 1e6, free / 1e9, total / 1e9, tokens),
        )
        return tokens

    def pack(self, examples: Sequence[Example]) -> PackedBatch:
        return pack(
            examples,
            image_token_id=self.model.config.image_token_id,
            merge_size=self.spec.merge_size,
            pad_to=self.packed.pad_to,
        )

    def load(self, work: Step) -> LoadedStep:
        """Packs a step's micro-batches and sends them to the device, beside what it is doing."""
        batches = [self.pack(examples) for examples in work.micro_batches]
        if self._copies is None:
            return LoadedStep(work, batches, None)
        with torch.cuda.stream(self._copies):
            return LoadedStep(work, [b.to(self.device) for b in batches], self._copies.record_event())

    def launch(self, loaded: LoadedStep | None, stopping: Callable[[], bool] = never) -> LaunchedStep:
        """Queues forward, backward and all-reduce of this rank's share of a step; a GPU is waited for only by `_aim`.

        Every rank launches every step: one without a share, or told to stop before its share is computed, abandons it
        for all.
        """
        self.optimizer.zero_grad(set_to_none=True)
        stream = torch.cuda.current_stream(self.device) if self._copies is not None else None
        if stream is not None and loaded is not None and loaded.ready is not None:
            stream.wait_event(loaded.ready)
            for batch in loaded.batches:
                batch.record_stream(stream)
        if self.packed.precision == "fp8" and self.step % self.config.aim_steps == 0:
            self._aim(loaded.work if loaded else None)
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        abandoned = loaded is None
        for batch in loaded.batches if loaded else ():
            abandoned = stopping()
            if abandoned or not loaded:
                break
            part = self.packed.loss(batch) / loaded.work.n_targets
            if part.requires_grad:  # not where no sample of the micro-batch has an image
                part.backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        loss, flag = self._sum_over_ranks(loss, abandoned)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm or math.inf)
        numbers = torch.stack((loss, norm.to(loss.device), flag))
        return LaunchedStep(loaded.work if loaded else None, numbers, stream.record_event() if stream is not None else None)

    def conclude(self, launched: LaunchedStep) -> dict[str, float] | None:
        """Waits for a step and updates the projector; returns loss (over the whole step), lr and grad_norm.

        A non-finite loss or gradient updates nothing; `MAX_SKIPPED_STEPS` in a row stop the run.

        Returns:
            None: the step was abandoned by every rank and nothing has changed.
        """
        work, rate = launched.work, learning_rate(self.config, self.step)
        loss, norm, abandoned = launched.numbers.tolist()
        if abandoned > 0 or work is None:
            return None
        if math.isfinite(loss) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.state["skipped_in_row"] = 0
        else:
            self._skip(work, loss)
            norm = math.nan
        self.step += 1
        self.state |= {"position": dict(work.position), "counts": dict(work.counts)}
        return {"loss": loss, "lr": rate, "grad_norm": norm}

    def train_step(self, work: Step | None, stopping: Callable[[], bool] = never) -> dict[str, float] | None:
        """One update from this rank's share: load, launch and conclude."""
        return self.conclude(self.launch(self.load(work) if work else None, stopping))

    def _sum_over_ranks(self, loss: torch.Tensor, abandoned: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums the gradients in one all-reduce, and with them the loss and whether a rank abandons the step.

        Every rank's share of the loss is already weighted.
        """
        flag = torch.full_like(loss, float(abandoned))
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return loss, flag
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([flag[None], loss[None], *(g.flatten() for g in gradients)])
        dist.all_reduce(flat)
        at = 2
        for parameter in self.parameters:
            parameter.grad = flat[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()
        return flat[1], flat[0]

    def _aim(self, work: Step | None) -> None:
        """Finds anew in which directions products in 8 bits must be nearly exact, from the first rank's share of a step.

        They move as the projector learns: with those of an untrained one, a trained one's loss is as wrong as without any.
        """
        started, directions = time.perf_counter(), self.packed.directions
        examples = [e for group in work.micro_batches for e in group][:AIM_SAMPLES] if work else []
        with self.packed.original_weights():
            if examples and not (dist.is_initialized() and dist.get_rank()):
                found = self.packed.find_directions(self.pack(examples).to(self.device))
                if all(bool(t.isfinite().all()) for t in found.values()):
                    directions = found
                else:
                    logger.warning("step %d: its samples give no finite directions; the former ones stay", self.step)
            if dist.is_initialized():
                flat = torch.cat([t.flatten() for t in directions.values()]).view(torch.uint8)
                dist.broadcast(flat, 0)
                parts = torch.split(flat.view(torch.bfloat16), [t.numel() for t in directions.values()])
                directions = {name: part.view_as(directions[name]) for name, part in zip(directions, parts)}
            self.packed.take_directions(directions)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        logger.info("step %d: directions found in %.1f s", self.step, time.perf_counter() - started)

    def _skip(self, work: Step, loss: float) -> None:
        self.state["skipped"] += 1
        self.state["skipped_in_row"] += 1
        samples = ", ".join(work.uids)
        logger.warning("step %d: loss %s or its gradient is not finite; skipped, samples %s", self.step, loss, samples)
        if self.state["skipped_in_row"] >= MAX_SKIPPED_STEPS:
            raise RunError(
                f"{MAX_SKIPPED_STEPS} steps in a row gave a non-finite loss or gradient, the last at step {self.step} with "
                f"the samples {samples}; look at them, or lower the learning rate ({self.config.learning_rate})"
            )

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], stopping: Callable[[], bool] = never) -> float | None:
        """Mean loss a supervised token over all ranks' examples; this rank computes those it was given.

        That of the model as it will be exported: training in 8 bits evaluates with the decoder's own weights.

        Returns:
            None: it was abandoned by every rank, because some rank was told to stop.

        Raises:
            RunError: the loss is not finite.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        lengths = [e.n_tokens for e in examples]
        with self.packed.exact():
            for group in split_by_tokens(lengths, math.ceil(sum(lengths) / self.state["micro_tokens"])):
                if stopping():
                    sums[2] = 1
                    break
                batch = self.pack([examples[i] for i in group]).to(self.device)
                sums[0] += self.packed.loss(batch)
                sums[1] += batch.n_targets
        if dist.is_initialized():
            dist.all_reduce(sums)
        if sums[2] > 0:
            return None
        loss = float(sums[0] / sums[1])
        if not math.isfinite(loss):
            raise RunError(
                f"the evaluation at step {self.step} gave a loss of {loss}: a frozen weight is not finite, or the projector "
                f"has diverged; look at the model, or lower the learning rate ({self.config.learning_rate})"
            )
        self.state["evaluated"] = self.step
        if not self.state["best"] or loss < self.state["best"][0]:
            self.state["best"] = [loss, self.step]
        return loss

    def checkpoint(self) -> Checkpoint:
        """A copy on the CPU, safe to write while training goes on."""
        moments: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.multi_modal_projector.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{name}.{key}"] = value.detach().cpu().clone()
        projector = {k: v.detach().cpu().clone() for k, v in self.model.multi_modal_projector.state_dict().items()}
        tensors = {"projector": projector, "optimizer": moments}
        if directions := {name: t.cpu().clone() for name, t in self.packed.directions.items()}:
            tensors["directions"] = directions
        bits = {"threads": torch.get_num_threads(), "dtype": self.dtype, "compiled": self.packed.compile_it}
        bits |= {"run": self.identity}
        return Checkpoint(self.step, tensors, {**self.state, **bits}, {})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes up where a checkpoint was made, with what decides bits as it was then.

        Raises:
            RunError: it is of another run, of other inputs, or began in another dtype than this model is held in.
        """
        check_continues(checkpoint, self.identity, self.dtype)
        self.model.multi_modal_projector.load_state_dict(checkpoint.tensors["projector"])
        for name, parameter in self.model.multi_modal_projector.named_parameters():
            prefix = f"{name}."
            moments = {k.removeprefix(prefix): v for k, v in checkpoint.tensors["optimizer"].items() if k.startswith(prefix)}
            # "step" is a CPU scalar wherever the parameter lives
            self.optimizer.state[parameter] = {k: v if k == "step" else v.to(self.device) for k, v in moments.items()}
        if self.packed.precision == "fp8" and "directions" in checkpoint.tensors:
            self.packed.take_directions(checkpoint.tensors["directions"])
        self.step = checkpoint.step
        self.state = {k: checkpoint.state[k] for k in self.state}
        self.state["micro_tokens"] = self.config.micro_tokens or self.state["micro_tokens"]
        self.packed.set_compiled(checkpoint.state["compiled"])
        torch.set_num_threads(checkpoint.state["threads"])


def _made_up_example(spec: ImageSpec, image_token_id: int, max_tokens: int) -> Example:
    """An image of the largest size that leaves room, and as much text again, half of it supervised."""
    side = min(math.isqrt(spec.max_pixels) // spec.factor, math.isqrt(max_tokens // 2)) * spec.merge_size
    n_image = spec.tokens((side, side))
    n_text = max(2, min(n_image, max_tokens - n_image))
    ids = np.array([image_token_id] * n_image + [1] * n_text, np.int32)
    patches = np.random.default_rng(0).integers(0, 256, (side * side, spec.patch_bytes), dtype=np.uint8)
    return Example("made-up", ids, len(ids) - max(1, n_text // 2), patches, (side, side))


def check_continues(checkpoint: Checkpoint, identity: Mapping[str, Any], dtype: str) -> None:
    """Raises RunError if the checkpoint is of another run, of other inputs, or of a run that computes in another dtype."""
    if found := differences(checkpoint.state["run"], identity):
        raise RunError(f"the checkpoint {checkpoint.name} is of another run ({found}); give what it began with")
    if checkpoint.state["dtype"] != dtype:
        raise RunError(
            f"the run computes in {checkpoint.state['dtype']} since its start, this machine would go on in "
            f"{dtype}; give --dtype {checkpoint.state['dtype']}"
        )


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Where two runs differ, as part of a sentence; empty where they do not."""
    ours = json.loads(json.dumps(ours))
    return "; ".join(f"{k} was {theirs.get(k)!r}, now {ours[k]!r}" for k in ours if theirs.get(k) != ours[k])


def run(
    alignment: Alignment,
    feed: Feed,
    held_out: Callable[[], Sequence[Example]],
    *,
    on_record: Callable[[dict[str, Any]], None],
    save: Callable[[Checkpoint], None],
    stopping: Callable[[], bool] = never,
) -> Iterator[int]:
    """Trains to the last step; yields the step after each, so that a caller may look in or stop.

    Args:
        held_out: gives this rank's share of the samples to evaluate on.
        on_record: takes each step's record: step, loss, lr, grad_norm, eval_loss, rates (per second), data_wait (share).
        save: takes checkpoints: at `save_steps`, at the best evaluation so far, and at the end, whatever ends the run.
        stopping: whether to end now. It is asked between micro-batches; an unfinished step or evaluation is abandoned
            by all ranks as soon as one is told.

    Raises:
        DataEnded: the data gave out; what was quarantined since the last step is recorded.
    """
    config = alignment.config
    saved = alignment.step

    def settle(record: dict[str, Any]) -> None:
        _settle(alignment, record, held_out, on_record, stopping)

    if alignment.evaluation_due:
        settle(alignment.state["unevaluated"] or {"step": alignment.step})
    started, waited = time.perf_counter(), 0.0
    loaded, ended = None, None
    if alignment.step < config.steps:
        loaded, ended, waited = _fetch(alignment, feed, stopping)
    while alignment.step < config.steps:
        launched = alignment.launch(loaded, stopping)
        work = launched.work
        if work and alignment.step + 1 < config.steps:  # the next step comes while the device works on this one
            loaded, ended, seconds = _fetch(alignment, feed, stopping)
            waited += seconds * launched.is_done()
        trained = alignment.conclude(launched)
        if trained is None or work is None:
            break
        settle(_record(alignment, work, trained, waited, time.perf_counter() - started))
        if alignment.step % config.save_steps == 0 or alignment.step in (config.steps, alignment.best_step):
            save(alignment.checkpoint())
            saved = alignment.step
        yield alignment.step
        started, waited = time.perf_counter(), 0.0
    if alignment.step > saved:
        save(alignment.checkpoint())
    if ended:
        on_record(_last_record(alignment, ended))
        raise ended


def _fetch(
    alignment: Alignment, feed: Feed, stopping: Callable[[], bool]
) -> tuple[LoadedStep | None, DataEnded | None, float]:
    """The next step on the device, or why there is none (both None: told to stop), and the seconds that took."""
    asked, loaded, ended = time.perf_counter(), None, None
    try:
        if work := feed.next(stopping):
            loaded = alignment.load(work)
    except DataEnded as error:
        ended = error
    return loaded, ended, time.perf_counter() - asked


def _settle(
    alignment: Alignment,
    record: dict[str, Any],
    held_out: Callable[[], Sequence[Example]],
    on_record: Callable[[dict[str, Any]], None],
    stopping: Callable[[], bool],
) -> None:
    """Records a step once, with its evaluation if that is due; if that is abandoned, the record waits for it."""
    alignment.state["unevaluated"] = record
    if alignment.evaluation_due:
        if (eval_loss := alignment.evaluate(held_out(), stopping)) is None:
            return
        record = record | {"eval_loss": eval_loss}
    alignment.state["unevaluated"] = None
    on_record(record)


def _record(alignment: Alignment, work: Step, trained: Mapping[str, float], waited: float, seconds: float) -> dict[str, Any]:
    """Of a step that took `seconds`, `waited` of them for data."""
    tokens = sum(e.n_tokens for examples in work.micro_batches for e in examples)
    record: dict[str, Any] = {**trained, "samples_per_s": len(work.uids) / seconds, "tokens_per_s": tokens / seconds}
    record |= {"data_wait": waited / seconds, "step": alignment.step, "skipped": alignment.state["skipped"], **work.counts}
    return record | ({"quarantined_now": list(work.quarantined)} if work.quarantined else {})


def _last_record(alignment: Alignment, ended: DataEnded) -> dict[str, Any]:
    """Of the step that was never filled: what was passed over for it counts, what waited in it was not used."""
    counts = Counts(**alignment.state["counts"])
    bad = len(ended.quarantined)
    counts = replace(counts, seen=counts.seen + bad, quarantined=counts.quarantined + bad)
    quarantined = list(ended.quarantined)
    return {"step": alignment.step + 1, "ended": str(ended), **asdict(counts), "quarantined_now": quarantined}


def set_threads(threads: int, workers: int) -> int:
    """Fixes the CPU threads of this process, which decide bits; 0 takes the cores over the workers on this machine."""
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // workers))
    return torch.get_num_threads()
