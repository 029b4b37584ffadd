"""What the page of compare.py is drawn with: its style, curves and bars as SVG, and cut-out pictures."""

import base64
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from itertools import combinations

from PIL import Image

from config_files import differences

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
LINE, GAP = 18, 4  # of callbacks.pictures: height of a line of text, space between panels
PANEL = 320  # pixels: the pictures of the page are at most this wide
Curve = dict[int, float]  # value by step

STYLE = """
body { font: 14px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
  max-width: 1320px; margin: 1.5rem auto; padding: 0 1.2rem }
h1 { font-size: 1.5rem; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem }
h3 { font-size: 1rem; margin: 1.1rem 0 .3rem } p { margin: .3rem 0 .6rem; max-width: 100ch }
.quiet { color: #595959; font-weight: 400 }
.note { border-left: 4px solid #E69F00; padding: .3rem .8rem; background: #fdf6e7 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .8rem; text-align: right; white-space: nowrap; vertical-align: top }
th { border-bottom: 1px solid #767676 } th[colspan] { text-align: center; border: 0 }
th:first-child, td:first-child { text-align: left }
tr.group td { font-weight: 600; border-top: 1px solid #bbb; padding-top: .4rem }
tr.seed td:first-child { padding-left: 2.2rem }
.diff td { white-space: pre-wrap; overflow-wrap: anywhere; border-top: 1px solid #ddd; min-width: 8rem }
.diff th, .diff td { text-align: left } select { font: inherit; max-width: 40% }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .45em; border: 1px solid #0003 }
.legend { max-width: none } .legend > span { margin-right: 1.4rem; white-space: nowrap }
.charts { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)) }
svg { width: 100%; max-width: 900px; height: auto }
svg text { font: 12px system-ui, "DejaVu Sans", sans-serif; fill: #1a1a1a } svg .title { font-weight: 600 }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); gap: .6rem }
figure { margin: 0; border-top: 4px solid #bbb; padding-top: 3px } figure img { width: 100%; display: block }
figcaption { font-size: 12px; overflow-wrap: anywhere } .pixels { image-rendering: pixelated }
"""
SCRIPT = """
const chosen = ["left", "right"].map(id => document.getElementById(id));
function show() {
  const pair = chosen.map(list => +list.value).sort((a, b) => a - b).join("-");
  for (const part of document.querySelectorAll("[data-pair]")) part.hidden = part.dataset.pair !== pair;
  document.getElementById("same").hidden = chosen[0].value !== chosen[1].value;
}
for (const list of chosen) list.addEventListener("change", show);
show();
"""


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those that are known, None of none."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def shown(values: Iterable[float | None], digits: int = 2) -> str:
    """Mean and, of several, sample standard deviation of the known values."""
    known = [value for value in values if value is not None]
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}" if known else "–"


def thinned(curve: Curve, width: int) -> Curve:
    """Means of the values within each `width` steps, at the middle of these."""
    bins: dict[int, list[float]] = {}
    for step, value in curve.items():
        bins.setdefault((step - 1) // width, []).append(value)
    return {int((i + 0.5) * width): statistics.mean(values) for i, values in bins.items()}


def key(name: str, color: str) -> str:
    return f'<span class="key" style="background:{color}"></span>{escape(name)}'


def legend(parts: Iterable[Sequence]) -> str:
    """The first two of each part, a name and its colour."""
    parts = (f"<span>{key(*part[:2])}</span>" for part in parts)
    return f'<p class="legend">{" ".join(parts)}</p>'


def quiet(sentence: str) -> str:
    return f'<p class="quiet">{sentence}</p>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, two or more, about `count` of them."""
    span = (high - low) or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / count))
    size *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / count <= factor * size * (1 + 1e-9))
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [size * i for i in range(first, max(last, first + 1) + 1)]


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def svg(width: int, height: int, title: str, marks: list[str]) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    return f"{head}{''.join(marks)}</svg>"


def chart(title: str, lines: Sequence[tuple[str, list[Curve]]], y_title: str, x_max: int) -> str:
    """Curves over steps: a thin line for each run, a thick one for the mean of several. "" without values.

    Args:
        lines: by group its colour and the curves of its runs; the mean is drawn where all of these are known.
        x_max: the last step on the axis.
    """
    values = [value for _, curves in lines for curve in curves for value in curve.values()]
    if not values:
        return ""
    width, right, bottom, left, top = 560, 536, 256, 58, 26
    xs, ys = ticks(0, max(x_max, 1)), ticks(min(values), max(values))

    def x(step: float) -> float:
        return left + (right - left) * step / xs[-1]

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - ys[0]) / (ys[-1] - ys[0])

    def line(curve: Curve, color: str, style: str) -> str:
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in sorted(curve.items()))
        return f'<polyline points="{points}" fill="none" stroke="{color}" {style}/>'

    marks = [text(left, 16, title, "start", ' class="title"')]
    for value in ys:
        marks.append(f'<path d="M{left} {y(value):.1f}H{right}" stroke="#ddd"/>')
        marks.append(text(left - 6, y(value) + 4, f"{value:,.6g}", "end"))
    for step in xs:
        marks.append(f'<path d="M{x(step):.1f} {bottom}v5" stroke="#767676"/>')
        marks.append(text(x(step), bottom + 18, f"{step:,.10g}"))
    marks.append(f'<path d="M{left} {bottom}H{right}" stroke="#767676"/>')
    marks.append(text((left + right) / 2, bottom + 36, "optimiser step"))
    marks.append(text(0, 0, y_title, more=f' transform="translate(13 {(bottom + top) / 2}) rotate(-90)"'))
    means = []
    for color, curves in lines:
        if len(curves) > 1:
            marks += [line(curve, color, 'stroke-opacity="0.5"') for curve in curves]
        steps = set.intersection(*map(set, curves)) if curves else ()
        middle = {step: mean(curve[step] for curve in curves) for step in steps}
        means.append(line(middle, color, 'stroke-width="2.6"'))
        for step, value in middle.items() if len(middle) <= 15 else ():
            means.append(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.2" fill="{color}"/>')
    return svg(width, bottom + 44, title, marks + means)


def bars(names: Sequence[str], parts: Sequence[tuple[str, list[dict[str, float | None]]]]) -> str:
    """Scores in percent by name: a bar for each group, with the deviation over its runs.

    Args:
        names: one block of bars for each.
        parts: by group its colour and the scores of its runs by name.
    """
    thick, left, right, top = 14, min(260, 14 + 7 * max(map(len, names))), 800, 22
    block = thick * len(parts) + 10
    bottom = top + block * len(names)

    def x(value: float) -> float:
        return left + (right - left) * min(100, max(0, value)) / 100

    marks = []
    for value in range(0, 101, 20):
        marks.append(f'<path d="M{x(value):.1f} {top - 6}V{bottom}" stroke="#ddd"/>')
        marks += [text(x(value), at, str(value)) for at in (top - 10, bottom + 14)]
    marks.append(text(x(50), bottom + 30, "IoU (%)"))
    for i, name in enumerate(names):
        marks.append(text(left - 8, top + (i + 0.5) * block, name, "end"))
        for j, (color, scores) in enumerate(parts):
            found = [score[name] for score in scores if score.get(name) is not None]
            y, middle = top + i * block + j * thick, mean(found) or 0
            end = x(middle)
            size = f'width="{end - left:.1f}" height="{thick - 2}"'
            marks.append(f'<rect x="{left}" y="{y}" {size} fill="{color}"/>')
            if len(found) > 1:
                spread = statistics.stdev(found)
                low, end = x(middle - spread), x(middle + spread)
                ends = "".join(f"M{at:.1f} {y + 2}v8" for at in (low, end))
                marks.append(f'<path d="M{low:.1f} {y + 6}H{end:.1f}{ends}" stroke="#1a1a1a"/>')
            marks.append(text(end + 6, y + 10, shown(found, 1), "start"))
    return svg(right + 100, bottom + 36, "IoU by class", marks)


def difference_tables(experiments: Sequence[tuple[str, str, dict]]) -> str:
    """Two lists to choose from, and the options that differ for each pair of them.

    Args:
        experiments: name, colour and config.
    """
    if len(experiments) < 2:
        return quiet("All runs have the same config but for their seeds.")

    def cell(value) -> str:
        words = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
        return f"<td>{escape(words if len(words) <= 400 else words[:400] + ' …')}</td>"

    lists, tables = [], []
    for at, chosen in enumerate(("left", "right")):
        options = (
            f'<option value="{i}"{" selected" * (i == at)}>{escape(name)}</option>'
            for i, (name, _, _) in enumerate(experiments)
        )
        lists.append(f'<select id="{chosen}">{"".join(options)}</select>')
    for (i, first), (j, second) in combinations(enumerate(experiments), 2):
        rows = ["<th>option</th>" + "".join(f"<th>{key(*own[:2])}</th>" for own in (first, second))]
        for option, one, other in differences(first[2], second[2]):
            rows.append(f"<td>{escape(option)}</td>{cell(one)}{cell(other)}")
        body = "".join(f"<tr>{row}</tr>\n" for row in rows)
        tables.append(f'<div class="wide" data-pair="{i}-{j}"><table class="diff">{body}</table></div>')
    same = '<p id="same" class="quiet" hidden>Choose two different ones.</p>'
    return f"<p>{' and '.join(lists)}</p>{same}{''.join(tables)}<script>{SCRIPT}</script>"


def panels(picture: Image.Image) -> list[Image.Image]:
    """Cut image, truth and prediction out of an RGB picture of callbacks.pictures.comparison; else []."""
    width, rest = divmod(picture.width - 3 * GAP, 4)
    bottom, lines = picture.height, 0
    # Each line of the legend below starts with 2 white columns and a swatch in a black frame.
    line_start = [(255, 255, 255)] * 2 + [(0, 0, 0)] * 14
    while (start := picture.height - LINE * (lines + 1) - 4) > LINE:
        if [picture.getpixel((x, start + 4)) for x in range(16)] != line_start:
            break
        bottom, lines = start, lines + 1
    if rest or not lines:
        return []
    return [picture.crop((i * (width + GAP), LINE, i * (width + GAP) + width, bottom)) for i in range(3)]


def figure(panel: Image.Image | None, caption: str, color: str, photo: bool = False) -> str:
    """A panel, at most PANEL pixels wide, above its caption (HTML); labels are kept without loss."""
    image = ""
    if panel is not None:
        size = min(PANEL, panel.width), max(1, round(panel.height * min(1, PANEL / panel.width)))
        small = panel.resize(size, Image.Resampling.BILINEAR if photo else Image.Resampling.NEAREST)
        file, kind = BytesIO(), "jpeg" if photo else "png"
        # Pictures of labels have few colours, so a palette holds them all.
        (small if photo else small.quantize(256, dither=Image.Dither.NONE)).save(file, kind, quality=85)
        uri = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
        image = f'<img src="{uri}" alt=""{"" if photo else " class=pixels"}>'
    return f'<figure style="border-color:{color}">{image}<figcaption>{caption}</figcaption></figure>\n'
