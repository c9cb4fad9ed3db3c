"""How a report looks, and what its pointer shows: the page's own style sheet and script."""

from __future__ import annotations

STYLE = """
:root{--paper:#fff;--card:#f7f8fa;--ink:#1c2128;--faint:#667085;--line:#d9dde3;
--k0:#2563eb;--k1:#d97706;--k2:#059669;--k3:#9333ea;--k4:#dc2626;--k5:#64748b}
@media (prefers-color-scheme:dark){:root{--paper:#12151a;--card:#1b2027;--ink:#e6e9ee;--faint:#98a2b3;--line:#333b46;
--k0:#60a5fa;--k1:#fbbf24;--k2:#34d399;--k3:#c084fc;--k4:#f87171;--k5:#94a3b8}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px}h1{font-size:26px;margin:0}h2{font-size:17px;margin:34px 0 10px}
.state,.note{color:var(--faint);margin:4px 0 0}.note{color:var(--k1)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:22px 0}
.tiles div{background:var(--card);border-radius:8px;padding:12px 14px}.tiles b{display:block;font-size:22px}
.tiles span{color:var(--faint);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,500px),1fr));gap:16px}
figure{position:relative;margin:0;background:var(--card);border-radius:8px;padding:14px}figcaption{font-weight:600}
svg{display:block;width:100%;height:auto}svg text{fill:var(--faint);font-size:11px}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--faint)}.mark{stroke:var(--k4);stroke-dasharray:2 3}
.pointer{stroke:var(--faint);visibility:hidden}.line{fill:none;stroke:var(--k);stroke-width:1.8;stroke-linejoin:round}
.band{fill:var(--k);opacity:.18}.fill{fill:var(--k);opacity:.85}.dot{fill:var(--k)}
.k0{--k:var(--k0)}.k1{--k:var(--k1)}.k2{--k:var(--k2)}.k3{--k:var(--k3)}.k4{--k:var(--k4)}.k5{--k:var(--k5)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;list-style:none;margin:6px 0 0;padding:0;font-size:13px;color:var(--faint)}
.legend li[class]::before,tr[class] td:first-child::before{content:"";display:inline-block;width:10px;height:10px;
border-radius:2px;background:var(--k);margin-right:6px}
output{position:absolute;top:12px;right:14px;font-size:12px;color:var(--ink);text-align:right;white-space:pre;
background:var(--card);pointer-events:none}
table{border-collapse:collapse;font-size:14px}td,th{padding:4px 22px 4px 0;border-bottom:1px solid var(--line);text-align:left;
vertical-align:top}td+td,th+th{font-variant-numeric:tabular-nums}.facts td:first-child{color:var(--faint);white-space:nowrap}
.facts td+td{overflow-wrap:anywhere}.shares{display:flex;height:18px;border-radius:4px;overflow:hidden;margin-bottom:10px;
max-width:720px}.shares i{background:var(--k)}summary{cursor:pointer;color:var(--faint)}
""".strip()

SCRIPT = """
document.querySelectorAll("figure").forEach(function (figure) {
  var svg = figure.querySelector("svg"), told = JSON.parse(figure.querySelector("script").textContent);
  var shown = figure.querySelector("output"), pointer = svg.querySelector(".pointer");
  var steps = told.steps, first = steps[0], span = steps[steps.length - 1] - first;
  svg.addEventListener("mousemove", function (event) {
    var box = svg.getBoundingClientRect(), width = svg.viewBox.baseVal.width;
    var x = (event.clientX - box.left) * width / box.width;
    var step = first + (x - told.left) / told.width * span, nearest = 0;
    steps.forEach(function (one, i) { if (Math.abs(one - step) < Math.abs(steps[nearest] - step)) nearest = i; });
    var place = told.left + (span ? (steps[nearest] - first) / span : 0.5) * told.width;
    pointer.setAttribute("x1", place); pointer.setAttribute("x2", place); pointer.style.visibility = "visible";
    shown.textContent = "step " + Math.round(steps[nearest]) + "\\n" + told.names.map(function (name, i) {
      return told.values[i][nearest] === "" ? "" : name + "  " + told.values[i][nearest];
    }).filter(Boolean).join("\\n");
  });
  svg.addEventListener("mouseleave", function () { shown.textContent = ""; pointer.style.visibility = "hidden"; });
});
""".strip()
