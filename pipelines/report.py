"""Reports: of a training run a loss curve and a page of captioned images; of a captioning a page. Each is one HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from artemis_vlm.errors import SampleError
from artemis_vlm.examples import Example
from artemis_vlm.image import ImageSpec, Patches, decode_image, unpatchify
from pipelines.recipe import EVAL_SHARES, TrainConfig

METRICS_FILE: Final = "metrics.jsonl"
CAPTIONS_FILE: Final = "captions.json"
MODEL_FOLDER: Final = "a3"
REPORT_FILE: Final = "report.html"
CURVE_FILE: Final = "loss.png"

_STYLE: Final = """
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1d2733;background:#fbfaf7}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}p.sub{color:#5d6b7a;margin-top:0}
table{border-collapse:collapse}td,th{padding:.3rem .8rem;border-bottom:1px solid #e2ded4;text-align:right}
th{color:#5d6b7a;font-weight:500}img.curve{max-width:100%}
.sample{display:grid;grid-template-columns:16rem 1fr;gap:1.2rem;padding:1rem 0;border-bottom:1px solid #e2ded4}
.sample img{width:100%;border-radius:.4rem}dt{color:#5d6b7a;font-size:.85rem}dd{margin:0 0 .6rem}dd.after{font-weight:600}
@media(max-width:40rem){.sample{grid-template-columns:1fr}}
"""


def duration(seconds: float) -> str:
    """`130 h 54 min`, `14 min 32 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def eval_table(records: Sequence[Mapping[str, Any]], steps: int) -> list[tuple[float, int, float]]:
    """(share of the steps, step, eval loss) at the evaluation nearest to each of the published shares."""
    evaluated = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    nearest = (
        [(share, min(evaluated, key=lambda s: (abs(s - share * steps), s))) for share in EVAL_SHARES] if evaluated else []
    )
    return [(share, step, evaluated[step]) for share, step in nearest]


def write_report(
    folder: Path, config: TrainConfig, captions: Sequence[Mapping[str, str]], shown: Sequence[Example], spec: ImageSpec
) -> None:
    """Writes the curve and the page beside the run's metrics."""
    records = read_metrics(folder / METRICS_FILE)
    curve = draw_curve(records, config)
    (folder / CURVE_FILE).write_bytes(curve)
    trained = [r for r in records if "loss" in r]
    rate = sum(r["samples_per_s"] for r in trained) / max(1, len(trained))
    rows = "".join(
        f"<tr><td>{s:.0%}</td><td>{n}</td><td>{loss:.4f}</td></tr>" for s, n, loss in eval_table(records, config.steps)
    )
    samples = "".join(_sample(caption, example, spec) for caption, example in zip(captions, shown))
    page = f"""{_head("A3 alignment")}
<h1>Projector alignment, {config.steps} steps of {config.batch_size} samples</h1>
<p class="sub">{html.escape(Path(config.decoder).name)} sees through {html.escape(Path(config.tower).name)};
{rate:.2f} samples/s, learning rate {config.learning_rate:g}, seed {config.seed}</p>
<h2>Loss</h2><img class="curve" alt="loss curve" src="{_data_uri(curve, "png")}">
<table><tr><th>of the steps</th><th>step</th><th>eval loss</th></tr>{rows}</table>
<h2>Held-out images</h2>{samples}</html>
"""
    (folder / REPORT_FILE).write_text(page, encoding="utf-8")


def summary(folder: Path, config: TrainConfig) -> str:
    """The end of a run in lines for a terminal: eval losses, captions, where everything is."""
    records = read_metrics(folder / METRICS_FILE)
    lines = [
        "",
        "eval loss  " + "  ".join(f"{share:.0%}: {loss:.4f}" for share, _, loss in eval_table(records, config.steps)),
        "",
    ]
    for row in json.loads((folder / CAPTIONS_FILE).read_text())[:4]:
        lines += [f"  truth   {row['truth']}", f"  before  {row['before']}", f"  after   {row['after']}", ""]
    where = config.output.rstrip("/")
    names = {"loss curve": CURVE_FILE, "report": REPORT_FILE, "metrics": METRICS_FILE, "model": MODEL_FOLDER}
    return "\n".join(lines + [f"{what:<11}{where}/{name}" for what, name in names.items()])


@dataclass(frozen=True, slots=True)
class CaptionSample:
    """An image file (may be empty or damaged), its caption if it has one, and which it is."""

    image: bytes
    caption: str | None
    name: str


def captions_page(title: str, subtitle: str, samples: Sequence[CaptionSample], errors: Sequence[tuple[str, int]]) -> str:
    """HTML with images beside their captions, and how often each reason for having none was met."""
    shown = "".join(
        f'<div class="sample">{_thumbnail(sample.image)}<dl><dt>{html.escape(sample.name)}</dt>'
        f'<dd class="after">{html.escape(sample.caption or "no caption")}</dd></dl></div>'
        for sample in samples
    )
    rows = "".join(f"<tr><td>{count}</td><td>{html.escape(reason)}</td></tr>" for reason, count in errors)
    table = f"<h2>Without a caption</h2><table><tr><th>rows</th><th>why</th></tr>{rows}</table>" if errors else ""
    return f"""{_head("A3 captions")}
<h1>{html.escape(title)}</h1><p class="sub">{html.escape(subtitle)}</p>{table}
<h2>Some of them</h2>{shown}</html>
"""


def _thumbnail(data: bytes) -> str:
    try:
        image = decode_image(data)
    except SampleError:
        return "<div></div>"
    image.thumbnail((512, 512))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return f'<img alt="captioned image" src="{_data_uri(out.getvalue(), "jpeg")}">'


def _head(title: str) -> str:
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title><style>{_STYLE}</style>"
    )


def draw_curve(records: Sequence[Mapping[str, Any]], config: TrainConfig) -> bytes:
    """Training and evaluation loss over steps, as PNG bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only reports draw
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    trained = [(r["step"], r["loss"]) for r in records if "loss" in r]
    evaluated = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    if trained:
        axes.plot(*zip(*trained), color="#9fb3c8", linewidth=1, label="training step")
    if evaluated:
        axes.plot(*zip(*evaluated), color="#c2410c", marker="o", markersize=4, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.set_xlim(0, config.steps)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _sample(caption: Mapping[str, str], example: Example, spec: ImageSpec) -> str:
    image = jpeg_uri(unpatchify(Patches(example.patches, example.grid), spec))
    entries = "".join(
        f'<dt>{title}</dt><dd class="{key}">{html.escape(caption.get(key, ""))}</dd>'
        for key, title in (("after", "after training"), ("before", "before training"), ("truth", "truth"))
    )
    return f'<div class="sample"><img alt="held-out image" src="{image}"><dl>{entries}</dl></div>'


def jpeg_uri(image: Image.Image) -> str:
    """An image for a page that holds all it shows."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return _data_uri(out.getvalue(), "jpeg")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
