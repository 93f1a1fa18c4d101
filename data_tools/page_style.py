"""How the page of `vitscale-data inspect` looks: light or dark as its reader's system, on a phone or a wide screen."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --mount: #f1f3f5; --line: #dcdfe3; --ink: #16191d; --faint: #5a626c; --bar: #2a6fbb;
  --alarm: #b3261e; --good: #1d7a44;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --mount: #1f2327; --line: #343a40; --ink: #e8eaed; --faint: #a3abb5; --bar: #6aa9ea;
    --alarm: #ff8a80; --good: #6fcf97;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 76rem; padding: 1.5rem clamp(1rem, 3vw, 2rem) 4rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
.faint, figcaption span { color: var(--faint); }
.good { color: var(--good); }
.alarm { color: var(--alarm); }
code { font: .875em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.score { font-size: 1.6rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; margin-bottom: 1.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; }
th[scope=row] { font-weight: 400; color: var(--faint); white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem 2.5rem; }
.columns > * { min-width: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1.25rem .9rem; }
figure { margin: 0; min-width: 0; }
.mount {
  position: relative; aspect-ratio: 1; overflow: hidden; border-radius: 4px; background: var(--mount);
  margin-bottom: .4rem;
}
.mount img { position: absolute; width: 100%; height: 100%; object-fit: contain; }
.mount p { margin: 0; padding: .75rem; font-size: .8rem; color: var(--faint); overflow-wrap: anywhere; }
figcaption { font-size: .875rem; line-height: 1.35; overflow-wrap: anywhere; }
figcaption span { display: block; font-size: .75rem; }
svg { display: block; width: 100%; max-width: 36rem; height: auto; overflow: visible; }
svg text { fill: var(--faint); font-size: 14px; font-variant-numeric: tabular-nums; }
@media (max-width: 40rem) { svg text { font-size: 16px; } }
svg .name { fill: var(--ink); }
svg .bar { fill: var(--bar); }
svg line.grid { stroke: var(--line); }
"""
