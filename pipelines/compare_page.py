"""A comparison as one self-contained HTML page, and as JSON. Lays out what `pipelines.compare` has measured."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from artemis_vlm.examples import Example
from artemis_vlm.image import ImageSpec, Patches, unpatchify
from pipelines.bootstrap import Interval
from pipelines.compare import Comparison, SetResult
from pipelines.figures import Compared, Difference, Figure, Row, shown
from pipelines.names import Names
from pipelines.report import jpeg_uri
from pipelines.storage import RunFolder

PAGE_FILE: Final = "comparison.html"
RESULTS_FILE: Final = "comparison.json"
TEMPLATE: Final = Path(__file__).with_name("compare.html")
#: Samples of a set on the page; all are in the JSON.
SHOWN: Final = 100
#: Pixels of a plot: its width in its own units, and a model's line.
WIDTH, LINE = 400, 24


def write_comparison(comparison: Comparison) -> None:
    """Writes the page and the figures into the comparison's output."""
    output = RunFolder(comparison.config.output)
    output.write(RESULTS_FILE, json.dumps(comparison.to_json(), indent=1) + "\n")
    output.write(PAGE_FILE, page(comparison))
    output.discard()


def page(comparison: Comparison) -> str:
    """The page: equal comparisons give equal bytes, and it asks nothing of any other place."""
    config, names = comparison.config, [e.name for e in comparison.entrants]
    samples = sum(len(r.found.samples) for r in comparison.sets)
    dtype = str(config.torch_dtype).removeprefix("torch.")
    subtitle = (
        f"{samples} held-out samples, greedy captions of at most {config.max_new_tokens} tokens, {dtype} on "
        f"{config.device}, seed {config.seed}; brackets are 95 % intervals"
    )
    legend = "&emsp;".join(
        f"{_dot(i)}<b>{_text(e.name)}</b> <span class='soft small'>{_text(e.uri)}</span>"
        for i, e in enumerate(comparison.entrants)
    )
    fields = {
        "title": _text(" and ".join(names) if len(names) > 1 else names[0]),
        "subtitle": _text(subtitle),
        "legend": legend,
        "sets": "\n".join(_set_section(result, names) for result in comparison.sets),
        "samples_note": _samples_note(comparison),
        "set_options": "".join(f"<option>{_text(r.found.name)}</option>" for r in comparison.sets),
        "order_options": _order_options(names),
        "difference_hidden": "hidden" if len(names) == 1 else "",
        "most": f"{max(abs(d) for r in comparison.sets for d in _differences(r)):.2f}",
        "cards": "\n".join(card for result in comparison.sets for card in _cards(result, comparison)),
    }
    first, *rest = TEMPLATE.read_text(encoding="utf-8").split("{{")  # in one pass: no field is looked for in another
    return first + "".join(fields[name] + after for name, _, after in (part.partition("}}") for part in rest))


def _samples_note(comparison: Comparison) -> str:
    note = "Losses are in nats a token of the true caption."
    if len(comparison.entrants) > 1:
        first, last = comparison.entrants[0].name, comparison.entrants[-1].name
        note += f" Differences are {last} minus {first}: below zero, {last} is better."
    if comparison.names:
        note += " Objects that are there are green, others in red."
    left_out = sum(len(r.found.left_out) for r in comparison.sets)
    note += f" {left_out} samples could not be used; the JSON names them." if left_out else ""
    hidden = sum(max(0, len(r.found.samples) - SHOWN) for r in comparison.sets)
    return _text(note + (f" {hidden} more are in the JSON alone." if hidden else ""))


def _order_options(names: list[str]) -> str:
    options = {"file": "as in the data", "loss": "highest loss first"}
    if len(names) > 1:
        options = {
            "file": options["file"],
            "largest": "largest difference first",
            "later": f"{names[-1]} most ahead first",
            "earlier": f"{names[0]} most ahead first",
            "loss": options["loss"],
        }
    return "".join(f'<option value="{key}">{_text(title)}</option>' for key, title in options.items())


# --- figures ---------------------------------------------------------------------------------------------------------


def _set_section(result: SetResult, names: list[str]) -> str:
    found = result.found
    rows = "\n".join(_figure(compared, names) for compared in result.figures)
    return (
        f'<h2>{_text(found.name)}</h2><p class="soft small">{len(found.samples)} samples of {_text(found.uri)}</p>'
        f'<p class="lead">{_text(verdict(result, names))}</p><div class="figures">{rows}</div>'
    )


def verdict(result: SetResult, names: list[str]) -> str:
    """The two questions that matter, answered in words: which is better, and does each look."""
    figures = {c.figure.key: c for c in result.figures}
    sentences = []
    for d in figures["loss"].differences:
        later, earlier = names[d.later], names[d.earlier]
        told = shown(figures["loss"].figure, d.interval, signed=True)
        if d.interval.clear:
            word = "lower" if d.interval.value < 0 else "higher"
            sentences.append(f"{later} has a clearly {word} loss than {earlier}: {told} nats a token.")
        else:
            sentences.append(f"The losses of {later} and {earlier} cannot be told apart: {told} nats a token.")
    gain = figures["gain"]
    for name, interval in zip(names, gain.values):
        looks = interval.low > 0
        sentences.append(
            f"{name} {'looks at the image' if looks else 'shows no sign of looking at the image'}: "
            f"another sample's costs it {shown(gain.figure, interval, signed=True)}."
        )
    return " ".join(sentences)


def _figure(compared: Compared, names: list[str]) -> str:
    figure = compared.figure
    values = "".join(f"<li>{_dot(i)}{_text(shown(figure, v))}</li>" for i, v in enumerate(compared.values))
    differences = "".join(_difference(figure, d, names) for d in compared.differences)
    unit = {"nats": "nats a token", "share": "%", "points": "points"}[figure.unit]
    arrow = "less is better" if figure.lower else "more is better"
    return (
        f'<div class="figure"><div><h3>{figure.title}</h3><p class="soft small">{_text(figure.meaning)}; {unit}, {arrow}</p>'
        f'</div>{_plot(compared)}<ul class="values">{values}</ul><ul class="differences">{differences}</ul></div>'
    )


def _difference(figure: Figure, difference: Difference, names: list[str]) -> str:
    interval = difference.interval
    good = (interval.value < 0) == figure.lower
    style = ("good" if good else "bad") if interval.clear else ""
    later, known = names[difference.later], difference.better == difference.better
    pair = f"{later} \u2212 {names[difference.earlier]}" if len(names) > 2 else "difference"
    share = f"{_text(later)} better in {difference.better:.1%} of resamples" if known else ""
    return (
        f'<li class="{style}">{_text(pair)} <b>{_text(shown(figure, interval, signed=True))}</b>'
        f' <span class="soft small">{share}</span></li>'
    )


def _plot(compared: Compared) -> str:
    """Each model's value as a dot on its interval, on one scale; the line is zero, where it is in sight."""
    ends = [v for i in compared.values for v in (i.low, i.value, i.high) if v == v]
    if not ends:
        return "<div></div>"
    low, high = min(ends), max(ends)
    if compared.figure.key.endswith("gain"):
        low, high = min(low, 0.0), max(high, 0.0)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room

    def x(value: float) -> str:
        return f"{WIDTH * (value - low) / (high - low):.1f}"

    height = LINE * len(compared.values)
    zero = f'<path d="M{x(0)} 0V{height}" stroke="var(--soft)" stroke-dasharray="2 3"/>' if low < 0 < high else ""
    marks = "".join(_mark(i, interval, x) for i, interval in enumerate(compared.values))
    label = "; ".join(shown(compared.figure, v) for v in compared.values)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{_text(label)}">{zero}{marks}</svg>'


def _mark(index: int, interval: Interval, x: Callable[[float], str]) -> str:
    if interval.value != interval.value:
        return ""
    y, colour = LINE * index + LINE // 2, f"var(--m{index % 4})"
    line = ""
    if interval.low == interval.low:
        stroke = f'stroke="{colour}" stroke-width="3" stroke-linecap="round" opacity=".5"'
        line = f'<path d="M{x(interval.low)} {y}H{x(interval.high)}" {stroke}/>'
    return f'{line}<circle cx="{x(interval.value)}" cy="{y}" r="5" fill="{colour}"/>'


# --- samples ---------------------------------------------------------------------------------------------------------


def _differences(result: SetResult) -> list[float]:
    """Of each sample: the last model's loss minus the first's, a token."""
    return [(last.loss - first.loss) / first.tokens for first, last in zip(result.rows[0], result.rows[-1])]


def _cards(result: SetResult, comparison: Comparison) -> Iterator[str]:
    spec, names = comparison.entrants[0].encoder.spec, comparison.names
    differences, truths = _differences(result), result.found.truths
    for index, example in enumerate(result.examples[:SHOWN]):
        rows = [of_model[index] for of_model in result.rows]
        says = "".join(_says(i, e.name, row, names) for i, (e, row) in enumerate(zip(comparison.entrants, rows)))
        told = f" &middot; difference {differences[index]:+.3f}" if len(rows) > 1 else ""
        yield (
            f'<article class="card" data-set="{_text(result.found.name)}" data-difference="{differences[index]:.6f}" '
            f'data-loss="{rows[-1].loss / rows[-1].tokens:.6f}"><img alt="{_text(example.uid)}" '
            f'src="{_image(example, spec)}"><div class="body"><h4>truth &middot; {_text(result.found.name)} '
            f"{_text(example.uid)}{told}</h4><p>{_marked(truths[index], names, rows[0].there)}</p>{says}</div></article>"
        )


def _says(index: int, name: str, row: Row, names: Names | None) -> str:
    return (
        f'<div class="says" style="--c:var(--m{index % 4})"><h4>{_text(name)}<span>loss {row.loss / row.tokens:.3f}, '
        f"{row.shuffled / row.tokens:.3f} with another image</span></h4>"
        f"<p>{_marked(row.caption, names, row.there) or '<i>nothing</i>'}</p></div>"
    )


def _marked(text: str, names: Names | None, there: frozenset[str]) -> str:
    """A text with its object names marked: there or not."""
    out, at = "", 0
    for start, end in names.spans(text) if names else []:
        kind = "hit" if names and names.in_text(text[start:end]) <= there else "miss"
        out += f'{_text(text[at:start])}<mark class="{kind}">{_text(text[start:end])}</mark>'
        at = end
    return out + _text(text[at:])


def _image(example: Example, spec: ImageSpec) -> str:
    image = unpatchify(Patches(example.patches, example.grid), spec)
    image.thumbnail((384, 384))
    return jpeg_uri(image)


def _dot(index: int) -> str:
    return f'<span class="dot" style="--c:var(--m{index % 4})"></span>'


def _text(text: str) -> str:
    return html.escape(text)
