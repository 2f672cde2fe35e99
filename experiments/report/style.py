"""The page's style sheet and its few lines of script."""

from experiments.report.figure import FAINT, FONT, GRID, INK

CSS = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #fff; color: {INK}; font: 15px/1.5 {FONT}; }}
main {{ max-width: 1240px; margin: 0 auto; padding: 40px 28px 72px; }}
h1 {{ font-size: 30px; line-height: 1.2; font-weight: 650; margin: 0 0 12px; letter-spacing: -0.01em;
  overflow-wrap: anywhere; }}
h2 {{ font-size: 17px; line-height: 1.3; font-weight: 650; margin: 0 0 4px; }}
p {{ margin: 0 0 8px; }}
.kicker {{ color: {FAINT}; font-size: 13px; letter-spacing: .04em; text-transform: uppercase; }}
.asked {{ margin: 0 0 12px; padding: 0; list-style: none; max-width: 80ch; overflow-wrap: anywhere; }}
.key, .remark, .card > p {{ color: {FAINT}; font-size: 13px; max-width: 95ch; overflow-wrap: anywhere; }}
.tag {{ display: inline-block; padding: 0 8px; border-radius: 9px; font-size: 12px; line-height: 18px; color: {INK};
  border: 1.5px solid {INK}; }}
.tag.measured {{ background: {INK}; color: #fff; }}
.tag.forecast {{ border-style: dashed; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 20px;
  margin: 24px 0 48px; }}
.card {{ border: 1.5px solid {INK}; border-radius: 8px; padding: 18px 20px; break-inside: avoid; }}
.card.forecast {{ border-style: dashed; }}
.card h2 {{ font-size: 22px; }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 14px 18px; margin: 14px 0 0; }}
dt {{ color: {FAINT}; font-size: 12px; }}
dd {{ margin: 0; font-size: 20px; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums; }}
dd small {{ display: block; font-size: 12px; font-weight: 400; color: {FAINT}; line-height: 1.35; margin-top: 2px; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); column-gap: 40px; }}
figure {{ margin: 0 0 44px; min-width: 0; break-inside: avoid; display: grid; grid-template-columns: 100%;
  grid-row: span 4; grid-template-rows: subgrid; }}
.plot {{ min-width: 0; }}
label {{ font-size: 13px; color: {FAINT}; display: flex; gap: 8px; align-items: center; }}
select {{ font: inherit; color: {INK}; background: #fff; border: 1px solid #9ca3af; border-radius: 6px;
  padding: 3px 6px; min-width: 0; max-width: 100%; text-overflow: ellipsis; }}
.tables h2 {{ margin-top: 48px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; vertical-align: top; padding: 6px 12px 6px 0; border-bottom: 1px solid {GRID}; }}
th {{ font-weight: 600; border-bottom: 1.5px solid {INK}; vertical-align: bottom; }}
td:not(.n) {{ min-width: 16ch; max-width: 46ch; overflow-wrap: anywhere; }}
.n {{ text-align: right; white-space: nowrap; padding: 6px 0 6px 12px; }}
th.n {{ white-space: normal; }}
tr {{ break-inside: avoid; }}
h2, .remark {{ break-after: avoid; }}
@media (max-width: 600px) {{
  main {{ padding: 24px 16px 48px; }}
  h1 {{ font-size: 24px; }}
  .card {{ padding: 14px 16px; }}
}}
@media print {{
  @page {{ size: A4 landscape; margin: 12mm; }}
  body {{ font-size: 12px; }}
  main {{ max-width: none; padding: 0; }}
  .modebar {{ display: none; }}
  .cards {{ grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); }}
  dd {{ font-size: 15px; }}
  .scroll {{ overflow: visible; }}
  table {{ font-size: 10px; }}
  td:not(.n) {{ min-width: 0; }}
  .figures {{ grid-template-columns: 1fr 1fr; column-gap: 24px; }}
}}
"""

SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const touch = matchMedia("(pointer: coarse)").matches;  // there a drag is for scrolling the page
// Named one by one: plotly's default has a button that uploads the chart to its makers.
const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
const config = {displaylogo: false, responsive: true, modeBarButtons: buttons, plotlyServerURL: ""};
for (const {id, plot, views} of figures) {
  if (touch) plot.layout.dragmode = false;
  Plotly.newPlot(id, plot.data, plot.layout, config);
  document.querySelector(`select[data-for="${id}"]`)?.addEventListener("change", (event) => {
    const chosen = Number(event.target.value);
    const visible = views.flatMap((view, number) => Array(view.n_traces).fill(number === chosen));
    Plotly.update(id, {visible}, {"yaxis.title.text": views[chosen].y_title});
  });
}
const fit = (width) => figures.forEach(({id}) => Plotly.relayout(id, width ? {width} : {width: null, autosize: true}));
addEventListener("beforeprint", () => fit(490));  // half of A4 landscape
addEventListener("afterprint", () => fit(null));
"""
