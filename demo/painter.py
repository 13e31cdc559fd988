"""Paint labelled training scenes on the GPU: the same art as ``demo.scenes``, thousands of pictures a second.

A batch holds pictures of one size. Objects are bent, lit, tinted and mixed far more than in ``demo.scenes``, so that
the tower learns what an object is and not how one style draws it. Held-out pairs of names never meet in a picture.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from demo.scenes import ALL_NAMES, PALETTE, SPLIT_STYLES, held_out_pairs, sprite

TOKEN = 32  # px a side of one merged token
SLOTS = 8  # most objects in a picture
BACKGROUNDS = ("plain", "fade down", "fade right", "stripes", "checks", "dots", "grain")
IGNORE = -100


@dataclass(frozen=True)
class Painting:
    """Pictures and what each 32x32-pixel token of them shows. B pictures of T = (H / 32) * (W / 32) tokens, row by row.

    image: float16 on a GPU, float32 elsewhere (B, 3, H, W) in [0, 1]
    name: int64 (B, T), index in ALL_NAMES; len(ALL_NAMES) for background; IGNORE where an object barely touches
    centre: float32 (B, T, 2), (x, y) of the token's object in [0, 1] of the picture; valid where ``name`` is an object
    scale: float32 (B, T), longer side of the token's object / shorter side of the picture
    count: int64 (B, T), how many of the token's object the picture holds, less one
    colours: int64 (B, 2), index in PALETTE of the background's first and last colour
    background: int64 (B,), index in BACKGROUNDS
    """

    image: Tensor
    name: Tensor
    centre: Tensor
    scale: Tensor
    count: Tensor
    colours: Tensor
    background: Tensor


class Painter:
    """Holds the art of the training styles as textures and paints random batches from it."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        # Painting is bound by memory traffic. Half precision moves half as much and resolves 1/30 of a texel.
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.random = torch.Generator(device).manual_seed(seed)
        self.shapes = random.Random(seed)  # for what a batch shares: a number on the host needs no wait for the GPU
        # Two sizes, since sampling a large texture for a small object would alias.
        self.textures = {side: load_textures(side).to(device) for side in (64, 128)}
        self.palette = torch.tensor(list(PALETTE.values()), device=device) / 255
        self.forbidden = torch.zeros(len(ALL_NAMES), len(ALL_NAMES), dtype=torch.bool, device=device)
        index = {name: i for i, name in enumerate(ALL_NAMES)}
        pairs = torch.tensor([(index[a], index[b]) for a, b in held_out_pairs(ALL_NAMES)], device=device)
        self.forbidden[pairs[:, 0], pairs[:, 1]] = self.forbidden[pairs[:, 1], pairs[:, 0]] = True

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform random numbers."""
        return low + (high - low) * torch.rand(shape, device=self.device, generator=self.random)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal random numbers."""
        return torch.randn(shape, device=self.device, generator=self.random)

    def chance(self, probability: float, *shape: int) -> Tensor:
        """Booleans, true with this probability."""
        return torch.rand(shape, device=self.device, generator=self.random) < probability

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high)."""
        return torch.randint(high, shape, device=self.device, generator=self.random)

    @torch.no_grad()
    def paint(self, batch: int, height: int, width: int) -> Painting:
        """``batch`` random pictures of ``height`` x ``width`` pixels (multiples of 32)."""
        cell = 60 * (min(height, width) / 60) ** self.shapes.random()  # px an object has for itself
        side = 64 if cell < 100 else 128
        centre, size = self.place(batch, height, width, cell)
        name, present = self.choose_names(batch, centre.shape[1])
        slots = self.objects(name, side) * present[..., None, None, None]
        theta = self.pose(centre, size, height, width)

        # Front to back: `through` is the share of light that the objects painted so far let pass.
        image = torch.zeros(batch, 3, height, width, device=self.device, dtype=self.dtype)
        through = torch.ones(batch, 1, height, width, device=self.device, dtype=self.dtype)
        cover = []
        for slot in range(name.shape[1]):
            grid = F.affine_grid(theta[:, slot], [batch, 4, height, width], align_corners=False).to(self.dtype)
            art = through * F.grid_sample(slots[:, slot], grid, align_corners=False)
            image += art[:, :3]
            through -= art[:, 3:]
            cover.append(F.avg_pool2d(art[:, 3:], TOKEN).flatten(1).float())
        ground, colours, background = self.ground(batch, height, width)
        image = self.camera(image + through * ground)
        return Painting(
            image, *label(torch.stack(cover, 2), name, present, centre, size, height, width), colours, background
        )

    def place(self, batch: int, height: int, width: int, cell: float) -> tuple[Tensor, Tensor]:
        """Centres (B, K, 2) as (x, y) and longer sides (B, K), in pixels: one object a cell of a jittered lattice."""
        columns, rows = round(width / cell), round(height / cell)
        slots = min(SLOTS, columns * rows)
        cells = torch.rand(batch, columns * rows, device=self.device, generator=self.random).argsort(1)[:, :slots]
        corner = torch.stack((cells % columns, cells // columns), 2)
        span = torch.tensor((width / columns, height / rows), device=self.device)
        centre = (corner + 0.5 + self.uniform(-0.25, 0.25, batch, slots, 2)) * span
        return centre, (cell * self.uniform(0.5, 1.1, batch, slots)).clamp(min=42)

    def choose_names(self, batch: int, slots: int) -> tuple[Tensor, Tensor]:
        """Names (B, K) and whether each slot is painted (B, K). A name often repeats; held-out pairs never meet."""
        name = self.integers(len(ALL_NAMES), batch, slots)
        for slot in range(1, slots):
            name[:, slot] = torch.where(self.chance(0.3, batch), name[:, slot - 1], name[:, slot])
        present = self.chance(0.8, batch, slots)
        present[:, 0] = True
        for slot in range(1, slots):
            clash = self.forbidden[name[:, :slot], name[:, slot : slot + 1]] & present[:, :slot]
            present[:, slot] &= ~clash.any(1)
        return name, present

    def objects(self, name: Tensor, side: int) -> Tensor:
        """The art of each slot, in a random style and much changed: premultiplied RGBA (B, K, 4, side, side)."""
        textures = self.textures[side]
        count = name.numel()
        art = textures[self.integers(len(textures), count), name.flatten()].to(self.dtype) / 255
        art = self.bend(art)
        rgb, alpha = art[:, :3], art[:, 3:]
        rgb = (self.tint(count).to(self.dtype) @ rgb.flatten(2)).view_as(rgb)
        rgb = rgb * self.light(rgb, alpha) + alpha * self.uniform(-0.08, 0.08, count, 3, 1, 1).to(self.dtype)
        return torch.cat((torch.minimum(rgb.clamp(min=0), alpha), alpha), 1).unflatten(0, name.shape)

    def bend(self, art: Tensor) -> Tensor:
        """Displace (N, 4, S, S) by a smooth random field of up to a tenth or so of the side."""
        count, _, side, _ = art.shape
        field = self.normal(count, 2, 4, 4) * self.uniform(0, 0.09, count, 1, 1, 1)
        field = F.interpolate(field, size=(side, side), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        straight = torch.eye(2, 3, device=self.device).expand(count, 2, 3)
        grid = F.affine_grid(straight, [count, 4, side, side], align_corners=False)
        return F.grid_sample(art, (grid + field).to(self.dtype), align_corners=False)

    def tint(self, count: int) -> Tensor:
        """Colour matrices (N, 3, 3): turn the hue (mostly little: green apples stay green), scale chroma."""
        to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
        to_yiq = to_yiq.to(self.device)
        angle = self.normal(count) * torch.where(self.chance(0.3, count), 0.9, 0.22)
        chroma = self.uniform(0.35, 1.5, count)
        turn = torch.zeros(count, 3, 3, device=self.device)
        turn[:, 0, 0] = self.uniform(0.7, 1.25, count)
        turn[:, 1, 1] = turn[:, 2, 2] = chroma * angle.cos()
        turn[:, 1, 2], turn[:, 2, 1] = -chroma * angle.sin(), chroma * angle.sin()
        gain = torch.diag_embed(self.uniform(0.85, 1.15, count, 3))
        return gain @ to_yiq.inverse() @ turn @ to_yiq

    def light(self, rgb: Tensor, alpha: Tensor) -> Tensor:
        """A factor (N, 1, S, S) that shades flat art as if it were a rounded body lit from one side."""
        count, _, side, _ = alpha.shape
        height = alpha + self.uniform(-1, 1, count, 1, 1, 1).to(self.dtype) * rgb.mean(1, keepdim=True)
        reach = side // 8 * 2 + 1
        for _ in range(2):
            height = F.avg_pool2d(height, reach, stride=1, padding=reach // 2)
        angle = self.uniform(0, 2 * math.pi, count, 1, 1, 1)
        strength = self.uniform(0, 0.16, count, 1, 1, 1) * self.chance(0.7, count, 1, 1, 1) * side
        right, down = (strength * angle.cos()).to(self.dtype), (strength * angle.sin()).to(self.dtype)
        slope = right * F.pad(height.diff(dim=3), (0, 1)) + down * F.pad(height.diff(dim=2), (0, 0, 0, 1))
        slant = torch.linspace(-1, 1, side, device=self.device)
        fade_down, fade_right = self.uniform(-0.3, 0.3, 2, count, 1, 1, 1)
        fade = fade_down * slant[:, None] + fade_right * slant
        return (1 + fade.to(self.dtype) + slope).clamp(0.3, 1.8)

    def pose(self, centre: Tensor, size: Tensor, height: int, width: int) -> Tensor:
        """Affine maps (B, K, 2, 3) from the picture's to the texture's coordinates: mirror, tilt, stretch and shear."""
        shape = size.shape
        angle = self.normal(*shape) * torch.where(self.chance(0.2, *shape), 0.5, 0.18)  # radians
        stretch = self.uniform(-0.22, 0.22, *shape).exp()
        shear = self.uniform(-0.2, 0.2, *shape)
        mirror = 1 - 2 * self.chance(0.5, *shape).float()
        cos, sin = angle.cos(), angle.sin()
        tilt = torch.stack((cos, sin, -sin, cos), -1).unflatten(-1, (2, 2))
        zero = torch.zeros_like(shear)
        form = torch.stack((mirror * stretch, shear, zero, 1 / stretch), -1).unflatten(-1, (2, 2))
        linear = form @ tilt * (2 / size)[..., None, None]
        middle = centre - torch.tensor((width / 2, height / 2), device=self.device)
        offset = -linear @ middle[..., None]
        return torch.cat((linear * torch.tensor((width / 2, height / 2), device=self.device), offset), -1)

    def ground(self, batch: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Backgrounds (B, 3, H, W) as ``demo.scenes`` draws them, their two colours (B, 2) and kinds (B,)."""
        kind = self.integers(len(BACKGROUNDS), batch)
        fades = ((kind == 1) | (kind == 2))[:, None]
        colours = self.integers(len(PALETTE), batch, 2)
        colours = torch.where(fades, colours, colours[:, :1])
        first, last = (self.palette[colours] + self.normal(batch, 2, 3) * 0.02).unbind(1)
        y = torch.arange(height, device=self.device, dtype=torch.float32)[:, None].expand(height, width)
        x = torch.arange(width, device=self.device, dtype=torch.float32).expand(height, width)
        share = torch.where((kind == 1)[:, None, None], y / height, x / width)[:, None]
        pixels = first[:, :, None, None] + share * fades[..., None, None] * (last - first)[:, :, None, None]

        step = self.uniform(10, 36, batch, 1, 1)
        across = torch.where(self.chance(0.5, batch)[:, None, None], x, y)
        dot = (x % step / step - 0.5) ** 2 + (y % step / step - 0.5) ** 2 < 0.05
        checks = (x // step + y // step) % 2
        grain = self.normal(batch, height, width) / 2
        pattern = torch.zeros_like(grain)
        for number, drawn in ((3, across % step < step / 2), (4, checks), (5, dot), (6, grain)):
            pattern = torch.where((kind == number)[:, None, None], drawn.to(pattern.dtype), pattern)
        mean = first.mean(1)
        sign = torch.where((mean > 0.78) | ((mean > 0.24) & self.chance(0.5, batch)), -1.0, 1.0)
        shade = sign * self.uniform(0.07, 0.13, batch)
        pixels = (pixels + (shade[:, None, None] * pattern)[:, None]).clamp(0, 1)
        return pixels.to(self.dtype), colours, kind

    def camera(self, image: Tensor) -> Tensor:
        """What happens to a whole picture: blur or coarser sampling, noise, a little brightness and contrast."""
        batch = len(image)
        mix, noise, contrast, light = (
            self.uniform(low, high, batch, 1, 1, 1).to(self.dtype)
            for low, high in ((-0.6, 1), (0, 0.02), (0.93, 1.07), (-0.03, 0.03))
        )
        soft = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        image = torch.lerp(image, soft, mix * self.chance(0.6, batch, 1, 1, 1))
        grain = torch.randn(image.shape, device=self.device, dtype=self.dtype, generator=self.random)
        return ((image + noise * grain - 0.5) * contrast + 0.5 + light).clamp(0, 1)


def label(
    cover: Tensor, name: Tensor, present: Tensor, centre: Tensor, size: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels of each token from the share of it that each slot covers (B, T, K): name, centre, scale, count."""
    share, slot = cover.max(2)
    here = name.gather(1, slot)
    labels = torch.where(share > 0.2, here, torch.where(cover.sum(2) < 0.04, len(ALL_NAMES), IGNORE))
    same = (name[:, :, None] == name[:, None, :]) & present[:, None, :]
    count = same.sum(2).gather(1, slot).sub(1).clamp(0, 2)
    middle = (centre / torch.tensor((width, height), device=centre.device)).clamp(0, 0.999)
    scale = size.gather(1, slot) / min(height, width)
    return labels, middle.gather(1, slot[..., None].expand(-1, -1, 2)), scale, count


def load_textures(side: int) -> Tensor:
    """Every name in both training styles, as drawn and with details smoothed away: uint8 (4, N, 4, side, side).

    Premultiplied RGBA, since sampling between an opaque and a transparent texel would else bleed a dark rim.
    """
    textures = np.zeros((4, len(ALL_NAMES), 4, side, side), np.uint8)
    for number, style in enumerate(SPLIT_STYLES["train"]):
        for index, name in enumerate(ALL_NAMES):
            art = sprite(style, name)
            smooth = art.filter(ImageFilter.MedianFilter(5))
            smooth.putalpha(art.getchannel("A"))
            for variant, image in enumerate((art, smooth)):
                scale = side / max(image.size)
                fitted = image.resize(
                    (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
                )
                square = Image.new("RGBA", (side, side))
                square.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
                pixels = np.asarray(square).astype(np.uint16)
                pixels[..., :3] = pixels[..., :3] * pixels[..., 3:] // 255
                textures[2 * number + variant, index] = pixels.transpose(2, 0, 1)
    return torch.from_numpy(textures)
