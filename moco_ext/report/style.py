"""The page's frame and looks."""

from __future__ import annotations

import html
from collections.abc import Sequence

from .plots import RUN_COLOURS


def section(title: str, body: str, note: str = "") -> str:
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{body}{note}</section>"


def switches(names: Sequence[str]) -> tuple[str, str]:
    """A bar with a box for each run, which shows or hides what has class ``r<i>``; and the CSS that does it."""
    boxes = "".join(
        f'<label><input type="checkbox" id="show{i}" checked style="accent-color:var(--run{i % RUN_COLOURS})">'
        f"{html.escape(name)}</label>"
        for i, name in enumerate(names)
    )
    rules = "".join(f"body:has(#show{i}:not(:checked)) .r{i} {{ display: none; }}\n" for i in range(len(names)))
    return f'<nav aria-label="runs shown">{boxes}</nav>', rules


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{css}</style></head>
<body><main><header><h1>{title}</h1><p>{lead}</p></header>
{switches}
{body}
</main></body></html>
"""

CSS = """
:root { color-scheme: light dark; --ink: #1d2530; --soft: #5d6978; --line: #dfe4ea; --paper: #fbfbfa; --card: #fff;
  --pixels: #9aa5b1; --untrained: #e0973a; --wrong: #d6455d; --run0: #2f6fdb; --run1: #d9772b; --run2: #2c9a63;
  --run3: #c8427f; --run4: #7d57c2; --run5: #1f9bb3; --run6: #8a6a4a; --run7: #97951d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a4b3; --line: #2c3440; --paper: #12161c;
  --card: #191f27; --pixels: #76828f; --untrained: #e5a352; --wrong: #f0687e; --run0: #6aa1ff; --run1: #f0994f;
  --run2: #4fc48a; --run3: #f075ad; --run4: #ab8bf0; --run5: #4cc7de; --run6: #c09a72; --run7: #c9c74a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1080px; margin: 0 auto; padding: 56px 24px 72px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 8px; overflow-wrap: anywhere; }
header p { color: var(--soft); margin: 0 0 32px; overflow-wrap: anywhere; }
nav { position: sticky; top: 0; z-index: 1; display: flex; gap: 6px 22px; overflow-x: auto; padding: 12px 28px;
  margin: 0 0 24px; background: var(--card); border: 1px solid var(--line); border-radius: 14px; }
nav label { display: flex; align-items: center; gap: 8px; white-space: nowrap; font-weight: 500; cursor: pointer; }
nav input { width: 16px; height: 16px; margin: 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 26px 28px;
  margin: 0 0 24px; }
h2 { font-size: 19px; letter-spacing: -.01em; margin: 0 0 18px; }
h2 small { color: var(--soft); font-weight: 400; font-size: 15px; margin-left: 10px; }
.note { color: var(--soft); font-size: 14px; margin: 18px 0 0; max-width: 92ch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { font-weight: 500; text-align: left; }
tr:first-child > th { color: var(--soft); font-size: 14px; }
.results { max-width: 860px; }
.results td, .results th { padding: 9px 28px 9px 0; border-top: 1px solid var(--line); }
.results tr:first-child > * { border: 0; padding-bottom: 6px; }
.results th[scope] { white-space: nowrap; width: 1%; }
.results tr.trained th, .results tr.trained b { font-weight: 650; }
.results b { font-weight: 450; }
.score { display: flex; align-items: center; gap: 12px; }
.score b { min-width: 3em; text-align: right; }
.bar { position: relative; flex: 1; min-width: 60px; height: 10px; border-radius: 5px; background: var(--line); }
.bar i { display: block; height: 100%; border-radius: 5px; }
.bar s { position: absolute; top: -3px; width: 2px; height: 16px; background: var(--ink); border-radius: 1px; }
.figures { margin-top: 6px; }
.charts + .scroll .figures { margin-top: 26px; }
.figures td, .figures th { padding: 7px 0 7px 24px; text-align: right; border-top: 1px solid var(--line);
  white-space: nowrap; }
.figures tr:first-child > * { border: 0; }
.figures th[scope] { text-align: left; padding-left: 0; padding-right: 8px; }
.scroll th[scope] { position: sticky; left: 0; background: var(--card); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(290px, 100%), 1fr)); gap: 26px; }
.charts.of2, .charts.of4 { grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); }
figure { margin: 0; min-width: 0; display: flex; flex-direction: column; }
figcaption { font-size: 14px; font-weight: 500; margin-bottom: 8px; }
figcaption small { display: block; color: var(--soft); font-weight: 400; font-size: 13px; }
.charts figcaption small::before { content: ""; display: inline-block; width: 20px; margin-right: 7px;
  vertical-align: middle; border-top: 1.5px dashed var(--soft); }
figure svg { margin-top: auto; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: inherit !important; }
.neighbours th { font-size: 14px; padding: 4px 20px 8px 0; vertical-align: bottom; }
.neighbours td { padding: 4px 20px 4px 0; }
.neighbours small { display: block; color: var(--soft); font-weight: 400; font-size: 12.5px; }
.neighbours th[scope] { padding-bottom: 4px; }
.neighbours th div { display: flex; align-items: center; gap: 9px; white-space: nowrap; }
.neighbours img { width: 36px; height: 36px; object-fit: cover; image-rendering: pixelated; border-radius: 5px;
  display: block; }
.neighbours img[src^="data:image/jpeg"] { width: 48px; height: 48px; image-rendering: auto; }
.strip { display: flex; gap: 4px; }
.neighbours img.wrong { outline: 2.5px solid var(--wrong); outline-offset: -1px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 16px; font-size: 14px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px 22px; margin: 0; }
dt { color: var(--soft); font-size: 13px; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main { padding: 28px 12px 40px; } h1 { font-size: 27px; } header p { margin-bottom: 22px; }
  section { padding: 20px 16px; border-radius: 12px; } nav { padding: 10px 16px; border-radius: 12px; }
  .score { flex-direction: column-reverse; align-items: stretch; gap: 5px; } .score b { text-align: left; }
  .bar { height: 6px; flex: none; } .bar s { height: 12px; } .results td, .results th { padding-right: 16px; }
  .figures td, .figures th { padding-left: 16px; font-size: 14px; }
  dl { grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 12px 16px; }
}
"""
