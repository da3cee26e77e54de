"""How the page looks and the little that it does: one style sheet and one script, both inlined."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --raised: #f5f6f8; --ink: #16191d; --soft: #56606c; --edge: #dde1e7;
  --good: #0b7a4b; --bad: #b3372b; --shade: 47 158 106;
  --c0: #0b62c4; --c1: #c2500a; --c2: #0b7a4b; --c3: #8a3ec2; --c4: #8d6a08; --c5: #56606c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111418; --raised: #1a1f25; --ink: #e7eaee; --soft: #a0a9b4; --edge: #303740;
    --good: #58cf9c; --bad: #ff9283;
    --c0: #6db2ff; --c1: #ff9f68; --c2: #58cf9c; --c3: #cba3ff; --c4: #e2c04f; --c5: #a0a9b4;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
main, footer { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { margin: 40px 0 24px; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 8px; }
h2 {
  font-size: 1.35rem; letter-spacing: -.01em; margin: 56px 0 8px; padding-top: 20px;
  border-top: 1px solid var(--edge);
}
h3 { font-size: 1.05rem; margin: 28px 0 8px; }
h4 { font-size: .95rem; margin: 0; }
p { margin: 6px 0; max-width: 72ch; }
a { color: var(--c0); }
code, pre { font: .875em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; }
pre { overflow: auto; max-height: 480px; padding: 12px; background: var(--raised); border-radius: 8px; }
summary { cursor: pointer; margin: 16px 0; color: var(--soft); }
footer { margin: 64px auto 32px; color: var(--soft); font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .9rem; }
.lead { font-size: 1.1rem; }
.soft, .note { color: var(--soft); }
.note { font-size: .875rem; }
.missing {
  border-left: 3px solid var(--c1); padding: 8px 14px; background: var(--raised);
  border-radius: 0 8px 8px 0;
}
.scroll { overflow-x: auto; margin: 4px 0 20px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .925rem; }
th, td { padding: 7px 10px; border-bottom: 1px solid var(--edge); text-align: right; vertical-align: top; }
td, thead th { white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 500; font-size: .85rem; vertical-align: bottom; }
tbody th { font-weight: 600; }
td code { display: inline-block; min-width: 14em; white-space: normal; }
.facts {
  display: grid; grid-template-columns: max-content 1fr; gap: 6px 24px; margin: 16px 0;
  font-size: .95rem;
}
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }

.top { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 16px; }
.card { background: var(--raised); border-radius: 12px; padding: 18px 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 18px 16px; }
.tiles div span, .big span { display: block; color: var(--soft); font-size: .85rem; line-height: 1.35; }
.tiles b { display: block; font-size: 1.35rem; font-weight: 650; letter-spacing: -.01em; line-height: 1.3; }
.big b { font-size: 3.2rem; line-height: 1.1; letter-spacing: -.03em; font-weight: 700; }
.bars { display: grid; gap: 7px; margin: 14px 0 0; padding: 0; list-style: none; font-size: .85rem; }
.bars li {
  display: grid; grid-template-columns: minmax(0, 16em) 1fr 3.6em; gap: 10px; align-items: center;
}
.bars li > span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.bars i {
  display: block; height: 10px; min-width: 2px; border-radius: 2px; background: var(--soft);
  opacity: .55;
}
.bars .ours i { background: var(--c0); opacity: 1; }
.bars .ours { font-weight: 600; }

.charts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 28px 32px;
  margin: 20px 0;
}
.charts > .chart:first-child { grid-column: 1 / -1; }
.charts > .chart:first-child .plot { height: 320px; }
figure { margin: 0; min-width: 0; }
.chart figcaption { font-weight: 600; font-size: .95rem; }
.plot { position: relative; height: 200px; margin: 24px 12px 26px 52px; }
.plot svg {
  position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible;
  border-bottom: 1px solid var(--soft);
}
.plot line, .plot polyline { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.plot .grid { stroke: var(--edge); }
.plot .stage { stroke: var(--soft); stroke-dasharray: 2 4; }
.plot > span { position: absolute; font-size: 12px; line-height: 1; white-space: nowrap; }
.plot .x, .plot .y, .plot .name { color: var(--soft); }
.plot .y span { position: absolute; right: 8px; transform: translateY(-50%); }
.plot .x span { position: absolute; top: 8px; transform: translateX(-50%); }
.plot .name span { position: absolute; bottom: 5px; left: 3px; }
.plot .narrow span { left: auto; right: 3px; }
.plot .dot {
  width: 8px; height: 8px; margin: -4px; border-radius: 50%; background: currentColor;
  border: 1.5px solid var(--page);
}
.plot .cursor { width: 1px; top: 0; bottom: 0; background: var(--soft); }
.plot .tip {
  z-index: 2; top: 4px; padding: 7px 9px; line-height: 1.5; background: var(--page); color: var(--ink);
  border: 1px solid var(--edge); border-radius: 6px; pointer-events: none; white-space: pre;
}
.off { visibility: hidden; }
.c0 { stroke: var(--c0); color: var(--c0); } .c1 { stroke: var(--c1); color: var(--c1); }
.c2 { stroke: var(--c2); color: var(--c2); } .c3 { stroke: var(--c3); color: var(--c3); }
.c4 { stroke: var(--c4); color: var(--c4); } .c5 { stroke: var(--c5); color: var(--c5); }
polyline { stroke-width: 2; }
polyline.faint { stroke-width: 1; opacity: .4; }
polyline.c1 { stroke-dasharray: 7 3; } polyline.c2 { stroke-dasharray: 2 3; }
polyline.c3 { stroke-dasharray: 9 3 2 3; } polyline.c4 { stroke-dasharray: 4 4; }
polyline.c5 { stroke-dasharray: 1 4; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; }
.legend button {
  border: 0; padding: 3px 0; background: none; color: inherit; font: inherit; font-size: .85rem;
  cursor: pointer;
}
.legend button[aria-pressed=false] { opacity: .4; text-decoration: line-through; }
.legend i {
  display: inline-block; width: 18px; margin-right: 6px; vertical-align: middle;
  border-top: 3px solid currentColor;
}
.legend i.c1, .legend i.c3, .legend i.c4 { border-top-style: dashed; }
.legend i.c2, .legend i.c5 { border-top-style: dotted; }
.legend i.faint { border-top-width: 1px; }

.histogram {
  display: flex; align-items: flex-end; gap: 1px; height: 150px; margin: 16px 0 30px;
  border-bottom: 1px solid var(--soft);
}
.histogram div {
  position: relative; flex: 1; max-width: 80px; height: 100%; display: flex; align-items: flex-end;
}
.histogram i { width: 100%; min-height: 1px; background: var(--c0); }
.histogram div:hover i { background: var(--c1); }
.histogram span {
  position: absolute; top: 100%; left: 0; padding-top: 6px; font-size: 12px; line-height: 1;
  color: var(--soft); white-space: nowrap;
}

.samples {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 12px; margin: 16px 0;
  padding: 0; list-style: none;
}
.samples li {
  display: grid; grid-template-columns: 84px minmax(0, 1fr); gap: 12px; padding: 10px;
  border: 1px solid var(--edge); border-radius: 10px; font-size: .875rem; line-height: 1.4;
}
.samples img { width: 84px; height: 84px; border-radius: 6px; background: #fff; }
.samples b { display: block; overflow-wrap: anywhere; }
.samples span { display: block; color: var(--soft); overflow-wrap: anywhere; }
.samples .right > div > b { color: var(--good); }
.samples .right { border-color: var(--good); }
.samples .truth { margin-top: 6px; padding-top: 6px; border-top: 1px solid var(--edge); }
.samples .truth { color: var(--soft); overflow-wrap: anywhere; }
.samples .mark { font-size: .8rem; font-weight: 600; color: var(--bad); }
.samples .right .mark { color: var(--good); }

.swatches {
  display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 10px 0; padding: 0; list-style: none;
  font-size: .875rem;
}
.swatches i {
  display: inline-block; width: 14px; height: 14px; border-radius: 3px; vertical-align: -2px;
  margin-right: 4px; outline: 1px solid var(--edge);
}
.mask-figure {
  display: grid; grid-template-columns: minmax(0, 520px) minmax(0, 1fr); gap: 24px; align-items: start;
  margin: 16px 0;
}
.mask-figure .swatches { display: grid; gap: 8px; }
.masked { position: relative; padding: 16px 0 0 16px; }
.masked img { display: block; width: 100%; image-rendering: pixelated; }
.masked .keys { position: absolute; top: 0; right: 0; width: calc(100% - 16px); height: 12px; }
.masked .queries { position: absolute; left: 0; bottom: 0; width: 12px; height: calc(100% - 16px); }
.masked .mask { height: auto; outline: 1px solid var(--edge); }
.masked > div { position: relative; }
.masked span { position: absolute; padding: 0 6px; font-size: 12px; color: var(--soft); white-space: nowrap; }
.masked .before { transform: translateX(-100%); }
.strip {
  display: block; width: 100%; height: 36px; margin: 16px 0 0; image-rendering: pixelated;
  outline: 1px solid var(--edge);
}
.documents {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 12px;
}
.document { padding: 12px 14px; border: 1px solid var(--edge); border-radius: 10px; }
.document p { margin: 0 0 10px; font-size: .85rem; color: var(--soft); }
.padding {
  border-style: dashed;
  background: repeating-linear-gradient(135deg, transparent 0 8px, rgb(140 140 140 / .14) 8px 16px);
}
.content { line-height: 1.9; }
.token {
  display: inline-block; max-width: 100%; padding: 2px 1px; border: 1px solid var(--edge); border-radius: 4px;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .875rem;
  background: rgb(var(--shade) / calc(var(--weight, 0) * .55));
}
.special { font: .75rem ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; padding: 2px 4px; }
.patches { position: relative; display: inline-block; vertical-align: middle; margin: 4px; line-height: 0; }
.patches img { width: 136px; height: auto; image-rendering: pixelated; }
.patches .grid {
  position: absolute; inset: 0;
  background-image:
    linear-gradient(to right, rgb(128 128 128 / .6) 1px, transparent 1px),
    linear-gradient(to bottom, rgb(128 128 128 / .6) 1px, transparent 1px);
  background-size: calc(100% / var(--cols)) calc(100% / var(--rows));
}
/* Charts side by side begin at one height, with a legend or without. */
@media (min-width: 941px) {  .charts > .chart:not(:first-child) > figcaption + .plot { margin-top: 52px; }
}
@media (max-width: 800px) {
  .top, .mask-figure { grid-template-columns: minmax(0, 1fr); }
  .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: 8px; }
  .bars li { grid-template-columns: minmax(0, 11em) 1fr 3.4em; }
}
@media print { h2 { break-after: avoid; } figure, .samples li { break-inside: avoid; } }
"""

SCRIPT = """
"use strict";
const written = (value, unit) => unit === "percent" ? (100 * value).toPrecision(3) + "%"
  : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));

for (const plot of document.querySelectorAll("[data-chart]")) {
  const chart = JSON.parse(plot.dataset.chart), hidden = new Set();
  const [cursor, tip] = ["cursor", "tip"].map(name => {
    const span = plot.appendChild(document.createElement("span"));
    span.className = name;
    span.hidden = true;
    return span;
  });
  const nearest = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);

  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect(), [low, high] = chart.x;
    const at = low + (high - low) * (event.clientX - box.left) / box.width;
    const shown = chart.series.filter((one, i) => one.points.length && !hidden.has(i));
    if (!shown.length) return;
    const step = nearest(shown.map(one => nearest(one.points, at)), at)[0];
    const left = (step - low) / (high - low);
    tip.textContent = ["step " + step.toLocaleString("en"), ...shown.map(one => {
      const [x, y] = nearest(one.points, step);
      const where = x === step ? "" : " (step " + x.toLocaleString("en") + ")";
      return one.name + "  " + written(y, chart.unit) + where;
    })].join("\\n");
    cursor.style.left = 100 * left + "%";
    tip.style.left = left < .5 ? `calc(${100 * left}% + 8px)` : "auto";
    tip.style.right = left < .5 ? "auto" : `calc(${100 - 100 * left}% + 8px)`;
    cursor.hidden = tip.hidden = false;
  });
  plot.addEventListener("pointerleave", () => { cursor.hidden = tip.hidden = true; });

  for (const button of plot.parentElement.querySelectorAll("[data-series]")) {
    button.addEventListener("click", () => {
      const i = Number(button.dataset.series), off = !hidden.delete(i);
      if (off) hidden.add(i);
      button.setAttribute("aria-pressed", String(!off));
      plot.querySelectorAll(".s" + i).forEach(e => e.classList.toggle("off", off));
    });
  }
}
"""
