"use strict";
// Plots of this page: figures come from <script type="application/json" data-plot="ID">, colours
// of text and lines from the theme.
const mpqPlots = (() => {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  const drawn = new Map();

  function layoutOf(own) {
    const axis = () => ({
      gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--soft"), automargin: true,
    });
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 13 },
      margin: { l: 60, r: 16, t: 12, b: 48 },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
      hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
      ...own,
    };
    layout.xaxis = { ...axis(), ...(own.xaxis || {}) };
    layout.yaxis = { ...axis(), ...(own.yaxis || {}) };
    return layout;
  }

  function draw(id, data, layout) {
    const place = document.getElementById(id);
    if (!place || !window.Plotly) return;
    drawn.set(id, [data, layout]);
    Plotly.react(place, data, layoutOf(layout), config);
  }

  function drawAll(root) {
    for (const script of root.querySelectorAll('script[type="application/json"][data-plot]')) {
      const figure = JSON.parse(script.textContent);
      draw(script.dataset.plot, figure.data, figure.layout);
    }
  }

  addEventListener("DOMContentLoaded", () => drawAll(document));
  document.addEventListener("htmx:after:swap", () => drawAll(document));
  addEventListener("mpq-theme", () => { for (const [id, [data, layout]] of drawn) draw(id, data, layout); });
  return { draw, colour };
})();
