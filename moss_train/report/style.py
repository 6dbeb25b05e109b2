"""The page's style sheet: light and dark by the reader's setting, light on paper."""

from moss_train.report.palette import DARK, LIGHT


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


STYLE = f"""
:root {{ color-scheme: light; {_variables(LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {_variables(DARK)} }} }}
body {{ margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", Arial, sans-serif; }}
main {{ max-width: 1360px; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }}
h1 {{ font-size: 1.7rem; margin: 0 0 .3rem; }}
h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .7rem; }}
h3 {{ font-size: 1rem; margin: 0; display: inline; }}
a {{ color: inherit; }}
section, .card {{ background: var(--paper); border: 1px solid var(--grid); border-radius: 12px; padding: 1rem 1.2rem; }}
.badge {{ display: inline-block; border-radius: 999px; padding: .1rem .8rem; font-weight: 600; color: #fff; }}
.ok {{ background: #0f7a56; }} .bad {{ background: #c81e30; }}
.facts, .caption {{ color: var(--muted); margin: .2rem 0 0; }} .facts b {{ color: var(--ink); font-weight: 600; }}
.failures li {{ color: var(--error); }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
.figures th, .figures td {{ padding: .32rem .7rem; text-align: right; white-space: nowrap; }}
th, td {{ border-bottom: 1px solid var(--grid); }}
.figures th:first-child, .figures td:first-child {{ text-align: left; }}
thead th {{ color: var(--muted); font-weight: 600; font-size: .86rem; }}
tr.counts td, td.required {{ color: var(--muted); }}
td.main {{ font-weight: 650; }} td.reached {{ color: var(--good); }} td.missed {{ color: var(--error); }}
.curves svg {{ width: 100%; height: auto; display: block; }}
.calibration svg {{ max-width: 38rem; }}
.legend {{ color: var(--muted); margin: 0 0 .9rem; display: flex; flex-wrap: wrap;
  gap: .35rem 1.2rem; font-size: .9rem; }}
.chip {{ display: inline-block; width: 1.5em; height: .95em; border-radius: 4px; vertical-align: -.1em;
  margin-right: .4em; box-sizing: border-box; }}
details pre {{ overflow-x: auto; font-size: .82rem; }} summary {{ cursor: pointer; color: var(--muted); }}
.stream {{ margin: 0 0 1.2rem; }} h3 a {{ text-decoration: none; }} .all {{ display: none; float: right; }}
main:has(> .stream:target) > :not(:target, .legend) {{ display: none; }} .stream:target .all {{ display: inline; }}
.stream:target {{ scroll-margin-top: 100vh; }}
 .stream .caption {{ display: inline; }}
.line {{ display: grid; grid-template-columns: 4.7rem repeat(var(--columns), minmax(0, 1fr)); min-width: 1020px;
  font-size: 12px; line-height: 1.25; margin-top: .7rem; }}
.line > b {{ grid-column: 1; align-self: center; text-align: right; padding-right: .6rem; color: var(--muted);
  font-weight: 400; }}
.line > svg {{ grid-column: 2 / -1; width: 100%; height: auto; display: block; overflow: visible; }}
.line .t {{ text-align: center; color: var(--muted); padding: 1px 0 2px; white-space: nowrap; }}
.line .t.u {{ color: var(--user); }} .mark {{ color: var(--revise-text); }}
.f {{ margin: 0 3px 3px; display: flex; align-items: center; justify-content: center; text-align: center;
  min-height: 2.2rem; border-radius: 5px; }}
.f img {{ width: 100%; height: auto; display: block; border-radius: 5px; outline: 1px solid var(--grid); }}
.f img.tiny {{ image-rendering: pixelated; }}
.f.u {{ background: var(--user-back); color: var(--user); border: 1.5px solid var(--user); padding: 2px 3px; }}
.f.g {{ background: none; border: 1.5px dashed var(--silence-ink); color: var(--muted); padding: 2px; }}
.c {{ margin: 3px; border-radius: 6px; min-height: 2.9rem; padding: 2px 4px; display: flex; align-items: center;
  justify-content: center; text-align: center; box-sizing: border-box; border: 2px solid transparent; }}
.c > *, .f > span {{ display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden;
  overflow-wrap: anywhere; text-decoration: none; }}
.f > span {{ -webkit-line-clamp: 5; }} .f.none {{ background: var(--silence); }}
.c.silence {{ background: var(--silence); color: var(--silence-ink); }}
.c.unknown {{ border: 1px solid var(--grid); color: var(--silence-ink); }}
.c.speak {{ background: var(--speak); color: var(--speak-ink); }}
.c.revise {{ background: var(--revise); color: var(--revise-ink); }}
.c.silence:empty::before {{ content: "·"; }} .c.unknown:empty::before {{ content: "?"; }}
.c.on {{ margin-right: 0; border-top-right-radius: 0; border-bottom-right-radius: 0; }}
.c.from {{ margin-left: 0; border-top-left-radius: 0; border-bottom-left-radius: 0; }}
.c.timing {{ outline: 2px solid var(--error); outline-offset: -1px; }}
.c.answer {{ outline: 2px dashed var(--error); outline-offset: -1px; }}
.n {{ text-align: center; color: var(--muted); font-size: 11px; padding: 0 2px; overflow-wrap: anywhere; }}
.bad-tag {{ color: var(--error); font-weight: 600; }} .good-tag {{ color: var(--good); }}
.arc {{ fill: none; stroke: var(--revise-text); stroke-width: 2; }} .head {{ fill: var(--revise-text); }}
.curve {{ fill: none; stroke: var(--muted); stroke-width: 1.6; stroke-linejoin: round; }}
.dot {{ fill: var(--muted); }} .rule {{ stroke: var(--grid); stroke-width: 1; }}
.said {{ margin-top: .8rem; font-size: .88rem; }} .said table {{ margin-top: .4rem; }}
.said th, .said td {{ text-align: left; vertical-align: top; padding: .22rem .6rem; }}
.said td:first-child, .said td.lag, .said th {{ white-space: nowrap; color: var(--muted); }}
.said td.notes {{ min-width: 15rem; }} .said td.words {{ width: 55%; }}
.said td.words {{ overflow-wrap: anywhere; }} .said .who {{ white-space: nowrap; }}
.said tr:target {{ outline: 2px solid var(--revise); outline-offset: -2px; }}
.said .key {{ width: .8em; height: .8em; vertical-align: 0; }}
.chip.user, .said .user {{ background: var(--user); }} .chip.speak {{ background: var(--speak); }}
.chip.revise {{ background: var(--revise); }}
.chip.silence {{ background: var(--silence); border: 1.5px solid var(--silence-ink); }}
.chip.hears {{ background: var(--user-back); border: 1.5px solid var(--user); }}
.chip.timing {{ border: 2px solid var(--error); }} .chip.answer {{ border: 2px dashed var(--error); }}
.old {{ color: var(--muted); }}
@media print {{
  html {{ font-size: 10px; }} body {{ background: none; font-size: 11px; }} main {{ max-width: none; padding: 0; }}
  .line {{ min-width: 0; break-inside: avoid; font-size: 8.5px; }}
  .n {{ font-size: 8px; }} .scroll {{ overflow: visible; }}
  h2, .title, .legend {{ break-after: avoid; }} tr, .title {{ break-inside: avoid; }}
  .said {{ font-size: 9.5px; }} .said td.notes {{ min-width: 0; }} .said th, .said td {{ padding: .2rem .3rem; }}
  .c {{ min-height: 2.4rem; padding: 1px 2px; }} .f {{ min-height: 1.6rem; }}
  * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
}}
"""
