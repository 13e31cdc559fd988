"""Train the demo's vision tower: a small Qwen3-VL tower whose tokens say what they show. One GPU, minutes.

    python -m demo.train_tower --output demo/tower

The tower is exactly transformers' ``Qwen3VLVisionModel`` (no DeepStack). It learns from painted scenes (painter.py),
supervised at its output, the merged tokens: each token names its object, and says where the object's centre is, how
large it is, how many there are, and what the background looks like: all that a caption says. The heads are linear and
not kept; names use a cosine head with a margin, so that tokens of a name gather around one direction.
"""

import argparse
import io
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3VLVisionConfig, Qwen3VLVisionModel

from artemis_vlm.image import ImageSpec, Patches, decode_image, patchify
from demo.painter import BACKGROUNDS, IGNORE, TOKEN, Painter, Painting
from demo.scenes import ALL_NAMES, DEMO_NAMES, PALETTE, Placed, scene

CONFIG = Qwen3VLVisionConfig(
    depth=8,
    hidden_size=224,
    intermediate_size=896,
    num_heads=7,
    out_hidden_size=512,
    num_position_embeddings=1024,
    patch_size=16,
    spatial_merge_size=2,
    temporal_patch_size=2,
    in_channels=3,
    deepstack_visual_indexes=[],
)
SPEC = ImageSpec(min_pixels=32 * 32, max_pixels=512 * 512)
# Picture sizes in tokens (rows, columns); a batch has one size. They cover what SPEC makes of 128..640 px scenes.
SHAPES = (
    (4, 4), (4, 6), (6, 4), (6, 6), (5, 9), (9, 5), (8, 8), (7, 10), (10, 7), (10, 10), (9, 14), (14, 9), (12, 16),
    (16, 12), (16, 16),
)  # fmt: skip
BATCH_TOKENS = 16_384  # merged tokens a step, whatever the shape
SCALE, MARGIN = 20.0, 0.1  # of the cosine head


class Heads(nn.Module):
    """Linear readings of a merged token, for training alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.names = nn.Parameter(torch.randn(len(ALL_NAMES) + 1, width))  # the last row is background
        sizes = {"x": 3, "y": 3, "scale": 3, "count": 3, "first": len(PALETTE), "last": len(PALETTE),
                 "background": len(BACKGROUNDS)}  # fmt: skip
        self.classes = nn.ModuleDict({key: nn.Linear(width, size) for key, size in sizes.items()})
        self.place = nn.Linear(width, 5)  # token x, y; object x, y; log2 of the object's scale
        # What `standardise` took out of the tokens: the heads put it back.
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def name_logits(self, tokens: Tensor) -> Tensor:
        """Cosine to each name's direction (..., N + 1) from raw tokens (..., width)."""
        return F.linear(F.normalize(tokens.float(), dim=-1), F.normalize(self.names, dim=-1))

    def loss(self, tokens: Tensor, truth: Painting) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of all losses for raw float32 tokens (B, T, width), and its parts."""
        cosine = self.name_logits(tokens)
        known = truth.name != IGNORE
        target = truth.name.clamp(min=0)
        cosine = cosine - MARGIN * F.one_hot(target, cosine.shape[-1])
        weight = torch.ones(cosine.shape[-1], device=tokens.device)
        weight[-1] = 0.2  # most tokens are background, and it is easy
        parts = {"name": F.cross_entropy(SCALE * cosine[known], target[known], weight, label_smoothing=0.05)}

        objects = known & (target < len(ALL_NAMES))
        seen = tokens[objects]
        scale = truth.scale[objects]
        labels = {
            "x": (3 * truth.centre[objects][:, 0]).long(),
            "y": (3 * truth.centre[objects][:, 1]).long(),
            "scale": (scale > 0.25).long() + (scale > 0.41),
            "count": truth.count[objects],
        }
        for key, label in labels.items():
            parts[key] = 0.3 * F.cross_entropy(self.classes[key](seen), label)
        ground = {"first": truth.colours[:, 0], "last": truth.colours[:, 1], "background": truth.background}
        for key, label in ground.items():
            spread = label[:, None].expand(tokens.shape[:2])
            parts[key] = 0.15 * F.cross_entropy(self.classes[key](tokens).flatten(0, 1), spread.flatten())
        place = self.place(tokens)
        parts["place"] = F.mse_loss(place[..., :2], token_centres(truth.image).expand_as(place[..., :2]))
        parts["place"] += F.mse_loss(place[objects][:, 2:4], truth.centre[objects])
        parts["place"] += 0.2 * F.mse_loss(place[objects][:, 4], scale.log2())
        # The cosine head leaves the length of a token free: keep it near what a following MLP likes, 1 a channel.
        parts["length"] = 0.05 * (tokens.square().mean(-1) - 1).square().mean()
        return sum(parts.values(), tokens.new_zeros(())), parts


def token_centres(image: Tensor) -> Tensor:
    """(T, 2): centre (x, y) of each token of pictures (B, 3, H, W), in [0, 1] of the picture."""
    rows, columns = image.shape[2] // TOKEN, image.shape[3] // TOKEN
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    centres = torch.stack(((x + 0.5) / columns, (y + 0.5) / rows), -1)
    return centres.flatten(0, 1).to(image.device)


def merge_order(per_patch: Tensor) -> Tensor:
    """(..., h, w, C) of a patch grid to (..., h * w, C): the four patches of a merged token follow each other."""
    *lead, h, w, channels = per_patch.shape
    blocks = per_patch.reshape(*lead, h // 2, 2, w // 2, 2, channels)
    return blocks.transpose(-4, -3).reshape(*lead, h * w, channels)


class BatchedTower(nn.Module):
    """``Qwen3VLVisionModel.forward`` for a batch of equally large pictures; transformers' own loops over pictures."""

    def __init__(self, tower: Qwen3VLVisionModel) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, image: Tensor) -> Tensor:
        """Merged tokens (B, T, out_hidden_size), row by row, of pictures (B, 3, H, W) in [0, 1]."""
        config, tower = self.tower.config, self.tower
        size = config.patch_size
        h, w = image.shape[2] // size, image.shape[3] // size
        patches = (2 * image - 1).unflatten(3, (w, size)).unflatten(2, (h, size))  # mean and std are 0.5
        patches = merge_order(patches.permute(0, 2, 4, 1, 3, 5).flatten(3))
        # Both temporal frames are the same picture, so their kernels add up.
        kernel = tower.patch_embed.proj.weight.sum(2).flatten(1)
        x = F.linear(patches, kernel, tower.patch_embed.proj.bias) + self.positions(h, w)
        rotation = self.rotation(h, w)
        for block in tower.blocks:
            x = run_block(block, x, *rotation, config.num_heads)
        return tower.merger(x).unflatten(0, (len(image), -1))

    def positions(self, h: int, w: int) -> Tensor:
        """The learned square of position embeddings resampled to the grid: (h * w, hidden_size)."""
        weight = self.tower.pos_embed.weight
        side = math.isqrt(len(weight))
        square = weight.T.reshape(1, -1, side, side)
        grid = F.interpolate(square, size=(h, w), mode="bilinear", align_corners=True)[0]
        return merge_order(grid.permute(1, 2, 0))

    def rotation(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (h * w, head_dim) of the axial rotary embedding."""
        device = self.tower.pos_embed.weight.device
        quarter = self.tower.config.hidden_size // self.tower.config.num_heads // 4
        frequency = 10_000.0 ** (-torch.arange(quarter, device=device) / quarter)
        y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        angle = (merge_order(torch.stack((y, x), -1))[..., None] * frequency).flatten(1)
        angle = torch.cat((angle, angle), 1)
        dtype = self.tower.pos_embed.weight.dtype
        return angle.cos().to(dtype), angle.sin().to(dtype)


def run_block(block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """One transformer block of the tower on (B, n, hidden_size)."""
    qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = rotate(qkv[:2], cos, sin)
    attended = F.scaled_dot_product_attention(q, k, qkv[2]).transpose(1, 2).flatten(2)
    x = x + block.attn.proj(attended)
    return x + block.mlp(block.norm2(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (..., n, head_dim)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def train(tower: Qwen3VLVisionModel, heads: Heads, *, steps: int, rate: float, seed: int) -> None:
    """AdamW on painted scenes; the learning rate warms up over 5 % of the steps and falls to zero as a cosine."""
    device = tower.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    painter = Painter(device, seed)
    model = BatchedTower(tower)
    parameters = [*tower.parameters(), *heads.parameters()]
    matrices = [p for p in parameters if p.ndim > 1]
    groups = [{"params": matrices, "weight_decay": 0.05},
              {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=device.type == "cuda")
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    begin = time.perf_counter()
    for step in range(steps):
        rows, columns = painter.shapes.choice(SHAPES)
        truth = painter.paint(BATCH_TOKENS // (rows * columns), rows * TOKEN, columns * TOKEN)
        # Weights are float32 and cast once a step; all inside is then bfloat16, which autocast's layer norms are not.
        weights = {key: value.to(dtype) for key, value in model.named_parameters()}
        tokens = torch.func.functional_call(model, weights, (truth.image.to(dtype),))
        loss, parts = heads.loss(tokens.float(), truth)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            told = " ".join(f"{key} {value.item():.3f}" for key, value in parts.items())
            print(f"step {step} {time.perf_counter() - begin:.0f}s loss {loss.item():.3f} {told}", flush=True)


@torch.no_grad()
def standardise(tower: Qwen3VLVisionModel, heads: Heads, seed: int) -> None:
    """Fold into the last linear layer what makes each output channel zero-mean and unit-scale over object tokens."""
    painter = Painter(tower.device, seed)
    tokens = []
    for rows, columns in SHAPES:
        truth = painter.paint(BATCH_TOKENS // (rows * columns), rows * TOKEN, columns * TOKEN)
        tokens.append(BatchedTower(tower)(truth.image.float())[(truth.name >= 0) & (truth.name < len(ALL_NAMES))])
    std, mean = torch.std_mean(torch.cat(tokens), dim=0)
    last = tower.merger.linear_fc2
    last.weight.copy_(last.weight / std[:, None])
    last.bias.copy_((last.bias - mean) / std)
    heads.mean.copy_(mean)
    heads.std.copy_(std)


def example(index: int, split: str, names: Sequence[str]) -> tuple[Patches, tuple[int, int], tuple[Placed, ...]]:
    """One scene as the tower will meet it: through JPEG and the project's own pixel path; with its size (w, h)."""
    made = scene(10_000_019, index, split=split, names=names)
    jpeg = io.BytesIO()
    made.image.save(jpeg, "JPEG", quality=90)
    return patchify(decode_image(jpeg.getvalue()), SPEC), made.image.size, made.objects


@torch.no_grad()
def features(tower: Qwen3VLVisionModel, patches: Patches) -> Tensor:
    """Merged tokens (T, out_hidden_size) of one picture by transformers' own forward."""
    pixels = torch.from_numpy(patches.pixels).to(tower.device).unflatten(1, (3, 1, -1)).expand(-1, -1, 2, -1)
    grid = torch.tensor([(1, *patches.grid)], device=tower.device)
    return tower((pixels.flatten(1) / 127.5 - 1).to(tower.dtype), grid_thw=grid).pooler_output


def tokens_in(placed: Placed, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Indices of the merged tokens whose centre lies in an object's box (of the nearest one if none does)."""
    rows, columns = grid[0] // 2, grid[1] // 2
    x1, y1, x2, y2 = placed.box
    y = (torch.arange(rows) + 0.5) / rows * size[1]
    x = (torch.arange(columns) + 0.5) / columns * size[0]
    inside = ((y > y1) & (y < y2))[:, None] & ((x > x1) & (x < x2))
    nearest = int((y - (y1 + y2) / 2).abs().argmin() * columns + (x - (x1 + x2) / 2).abs().argmin())
    return inside.flatten().nonzero()[:, 0] if inside.any() else torch.tensor([nearest])


@torch.no_grad()
def evaluate(tower: Qwen3VLVisionModel, heads: Heads, split: str, names: Sequence[str], count: int) -> dict[str, float]:
    """Shares of objects named right by a vote of the tokens in their box, choosing among ``names`` and among all."""
    chosen = torch.tensor([ALL_NAMES.index(name) for name in names])
    right = {"among_names": 0, "among_all": 0, "position": 0}
    total = 0
    with ProcessPoolExecutor() as pool:
        examples = pool.map(partial(example, split=split, names=names), range(count), chunksize=16)
        for patches, size, objects in examples:
            tokens = features(tower, patches).float() * heads.std + heads.mean
            votes = (SCALE * heads.name_logits(tokens))[:, :-1].softmax(-1).cpu()
            x, y = (heads.classes[axis](tokens).softmax(-1).cpu() for axis in "xy")
            for placed in objects:
                inside = tokens_in(placed, size, patches.grid)
                vote = votes[inside].sum(0)
                right["among_all"] += ALL_NAMES[int(vote.argmax())] == placed.name
                right["among_names"] += names[int(vote[chosen].argmax())] == placed.name
                middle = ((placed.box[0] + placed.box[2]) / size[0], (placed.box[1] + placed.box[3]) / size[1])
                told = tuple(int(axis[inside].sum(0).argmax()) for axis in (x, y))
                right["position"] += told == tuple(int(1.5 * m) for m in middle)
                total += 1
    return {"objects": total, **{key: round(value / total, 4) for key, value in right.items()}}


def main() -> None:
    """Train, standardise, save, measure what was saved."""
    parser = argparse.ArgumentParser(description="Train the demo's vision tower.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tower")
    parser.add_argument("--heads", type=Path, help="also save the training heads in this file (safetensors)")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--eval-count", type=int, default=1000, help="scenes in each evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True

    tower = Qwen3VLVisionModel(CONFIG).to(args.device)
    heads = Heads(CONFIG.out_hidden_size).to(args.device)
    train(tower, heads, steps=args.steps, rate=args.rate, seed=args.seed)
    standardise(tower, heads, args.seed + 1)
    tower.to(torch.bfloat16).save_pretrained(args.output)
    SPEC.save(args.output)
    if args.heads:
        save_file(heads.state_dict(), args.heads)
    report = {
        f"{split}/{label}": evaluate(tower, heads, split, names, args.eval_count)
        for split in ("heldout", "ood")
        for label, names in (("all", ALL_NAMES), ("demo", DEMO_NAMES))
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
