"use strict";
// The sliders of a run: each movement asks the server for the best allocation and draws it.
addEventListener("DOMContentLoaded", () => {
  const form = document.getElementById("knobs");
  if (!form) return;
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const view = read("view");
  const byId = (id) => document.getElementById(id);
  const base = `/runs/${form.dataset.run}`;
  let now = read("now");
  const stored = { limits: {}, url: base };
  for (const knob of view.knobs) stored.limits[knob.cost] = knob.limit;

  // --- numbers as people read them ---------------------------------------------------------
  const SCALES = {
    bytes: [["GB", 1e9], ["MB", 1e6], ["kB", 1e3], ["B", 1]], s: [["s", 1], ["ms", 1e-3], ["µs", 1e-6]],
    bitops: [["TBOPs", 1e12], ["GBOPs", 1e9], ["MBOPs", 1e6], ["bitops", 1]], J: [["J", 1], ["mJ", 1e-3], ["µJ", 1e-6]],
    MACs: [["GMACs", 1e9], ["MMACs", 1e6], ["MACs", 1]], LUTs: [["kLUTs", 1e3], ["LUTs", 1]],
  };
  const digits = (value) => String(Number(value.toPrecision(4)));
  function quantity(value, unit) {
    const scales = SCALES[unit] || [[unit, 1]];
    const [name, scale] = scales.find(([, s]) => Math.abs(value) >= s) || scales[scales.length - 1];
    return `${digits(value / scale)} ${name}`;
  }
  const loss = (value) => (value === null ? "–" : value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(3) : digits(value));

  // --- conditions, kept in the URL ------------------------------------------------------------
  const knobs = [...form.querySelectorAll(".knob[data-cost]")].map((place, number) => ({
    place, ...view.knobs[number],
    on: place.querySelector(".on"), slide: place.querySelector(".slide"),
    shown: place.querySelector(".limit"), total: place.querySelector(".total"),
  }));
  // The slider is logarithmic: the same way halves the budget anywhere.
  const toLimit = (knob, at) => knob.least * Math.pow(knob.most / knob.least, at / 1000);
  const toSlide = (knob, limit) => knob.most > knob.least && knob.least > 0
    ? Math.round((1000 * Math.log(limit / knob.least)) / Math.log(knob.most / knob.least)) : 1000;
  const pins = new Map();

  function conditions() {
    const asked = new URLSearchParams();
    for (const knob of knobs) if (knob.on.checked) asked.append("budget", `${knob.cost} <= ${knob.limit} ${knob.unit}`);
    for (const [unit, scheme] of pins) asked.append("pin", `${unit}=${scheme}`);
    if (byId("risk").value) asked.append("risk", byId("risk").value);
    return asked;
  }

  // --- drawing ---------------------------------------------------------------------------------
  const bits = byId("bits");
  const NS = "http://www.w3.org/2000/svg";
  const bars = [], marks = [];
  const TOP = 100, MOST = Math.log2(Math.max(16, ...view.palette.map((p) => p.bits)) + 1);
  const height = (entry) => 6 + (84 * Math.log2(entry.bits + 1)) / MOST;
  function makeBars() {
    const count = view.units.length;
    bits.setAttribute("viewBox", `0 0 ${count} 108`);
    view.units.forEach((unit, number) => {
      const group = document.createElementNS(NS, "g");
      const bar = document.createElementNS(NS, "rect");
      const mark = document.createElementNS(NS, "rect");
      const title = document.createElementNS(NS, "title");
      bar.setAttribute("x", number + 0.06); bar.setAttribute("width", 0.88);
      mark.setAttribute("x", number + 0.06); mark.setAttribute("width", 0.88);
      mark.setAttribute("y", TOP + 2); mark.setAttribute("height", 0);
      bar.append(title);
      group.append(bar, mark);
      group.addEventListener("click", () => { byId("unit").value = String(number); showUnit(); byId("scheme").focus(); });
      bits.append(group);
      bars.push([bar, title]); marks.push(mark);
    });
    at = document.createElementNS(NS, "rect");
    at.setAttribute("class", "at"); at.setAttribute("y", 1); at.setAttribute("height", 106); at.setAttribute("width", 1);
    bits.append(at);
  }
  let at;

  function drawBits() {
    const moved = new Set(now.moved), counts = new Map();
    if (!now.choice.length) for (const [bar] of bars) bar.setAttribute("height", 0);
    now.choice.forEach((place, number) => {
      const entry = view.palette[place], [bar, title] = bars[number], high = height(entry);
      bar.setAttribute("y", TOP - high); bar.setAttribute("height", high); bar.setAttribute("fill", entry.colour);
      title.textContent = `${view.units[number].name}: ${entry.scheme}`;
      const isPinned = pins.has(view.units[number].name);
      marks[number].setAttribute("height", isPinned || moved.has(number) ? 5 : 0);
      marks[number].setAttribute("class", isPinned ? "pin" : "moved");
      counts.set(place, (counts.get(place) || 0) + 1);
    });
    for (const place of document.querySelectorAll("[data-scheme]")) {
      const count = counts.get(Number(place.dataset.scheme)) || 0;
      place.textContent = count ? `× ${count}` : "";
      place.parentElement.hidden = !count;
    }
    const parts = [...counts].sort((a, b) => b[1] - a[1]).map(([p, n]) => `${n} at ${view.palette[p].scheme}`);
    byId("bits-text").textContent = now.choice.length
      ? `${view.units.length} units: ${parts.join(", ")}. ${moved.size} differ from the stored choice (marked below the bar), ${pins.size} pinned.`
      : "No allocation fits, so there is nothing to draw.";
  }

  function pointsAt(points, cost, key) {
    const kept = points.filter((p) => p[key] !== null && p[key] > 0 && cost in p.totals);
    return { x: kept.map((p) => p.totals[cost] / scaleOf(cost)[1]), y: kept.map((p) => p[key]), text: kept.map((p) => p.name), kept };
  }
  const scaleOf = (cost) => {
    const knob = view.knobs.find((k) => k.cost === cost), scales = SCALES[knob.unit] || [[knob.unit, 1]];
    return scales.find(([, s]) => knob.most >= s) || scales[scales.length - 1];
  };
  let lastTrace = -1;
  function drawFrontier() {
    const cost = byId("axis").value;
    if (!cost || !window.Plotly) return;
    const [unitName] = scaleOf(cost), knob = view.knobs.find((k) => k.cost === cost);
    const frontier = pointsAt(view.frontiers[cost], cost, "predicted");
    const uniform = pointsAt(view.uniforms, cost, "predicted");
    const measured = pointsAt(view.measured, cost, "measured");
    const data = [
      { ...frontier, name: "exact frontier (predicted)", mode: "lines+markers", line: { color: mpqPlots.colour("--accent"), shape: "hv" }, marker: { size: 5 } },
      { ...uniform, name: "one scheme everywhere (predicted)", mode: "markers+text", textposition: "top center", cliponaxis: false,
        marker: { symbol: "square-open", size: 9, color: mpqPlots.colour("--soft") }, textfont: { size: 11, color: mpqPlots.colour("--soft") } },
      { ...measured, name: `measured (${view.divergence})`, mode: "markers", marker: { symbol: "x-thin", size: 8, line: { width: 2, color: mpqPlots.colour("--mark") } },
        error_y: { array: measured.kept.map((p) => 1.96 * p.stderr), color: mpqPlots.colour("--mark"), thickness: 1 } },
      { ...herePoint(cost), name: "this answer", mode: "markers", marker: { symbol: "diamond", size: 14, color: mpqPlots.colour("--ink") } },
    ];
    for (const trace of data) { trace.hovertemplate = `%{text}<br>%{x:.4g} ${unitName}<br>%{y:.4g}<extra></extra>`; delete trace.kept; }
    lastTrace = data.length - 1;
    mpqPlots.draw("frontier", data, {
      xaxis: { title: { text: `${knob.label}, ${unitName}` } },
      yaxis: { type: "log", exponentformat: "power", title: { text: "loss" } },
      shapes: budgetLine(cost),
    });
    const best = frontier.kept;
    byId("frontier-text").textContent = best.length
      ? `Predicted loss falls from ${loss(best[0].predicted)} at ${quantity(best[0].totals[cost], knob.unit)} to ${loss(best[best.length - 1].predicted)} at ${quantity(best[best.length - 1].totals[cost], knob.unit)}; the diamond is the answer to the sliders.` : "";
  }
  function herePoint(cost) {
    const here = now.costs.find((c) => c.name === cost);
    return here && now.score > 0 ? { x: [here.total / scaleOf(cost)[1]], y: [now.score], text: ["this answer"] } : { x: [], y: [], text: [] };
  }
  function budgetLine(cost) {
    const knob = knobs.find((k) => k.cost === cost);
    if (!knob || !knob.on.checked) return [];
    const x = knob.limit / scaleOf(cost)[1];
    return [{ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { dash: "dash", width: 1.5, color: mpqPlots.colour("--soft") } }];
  }
  function moveHere() {
    const place = byId("frontier"), cost = byId("axis").value;
    if (!place.data || lastTrace < 0) return;
    const here = herePoint(cost);
    Plotly.update(place, { x: [here.x], y: [here.y], text: [here.text] }, { shapes: budgetLine(cost) }, [lastTrace]);
  }

  function drawAnswer() {
    byId("score").textContent = loss(now.score);
    byId("stored-score").textContent = loss(now.stored_score);
    byId("moved").textContent = now.choice.length ? `${now.moved.length} of ${view.units.length}` : "–";
    byId("seconds").textContent = `${digits(1e3 * now.seconds)} ms`;
    byId("said").textContent = now.said;
    for (const knob of knobs) {
      const cost = now.costs.find((c) => c.name === knob.cost);
      knob.total.textContent = cost ? cost.text + (cost.quantile_text ? ` (${cost.quantile_text} at that probability)` : "") : "–";
    }
    drawBits();
    moveHere();
    showUnit();
  }

  function showUnit() {
    const number = Number(byId("unit").value), unit = view.units[number], choose = byId("scheme");
    if (!unit) return;
    const isFree = !pins.has(unit.name);
    choose.replaceChildren();
    const free = new Option(now.choice.length ? `free (now ${view.palette[now.choice[number]].scheme})` : "free", "");
    choose.append(free, ...unit.schemes.map((scheme) => new Option(`pin to ${scheme}`, scheme)));
    choose.value = isFree ? "" : pins.get(unit.name);
    at.setAttribute("x", number);
    byId("unit-text").textContent = `${unit.name}: ${unit.shape}, ${digits(100 * unit.share)} % of the searched weights, ${unit.layers.length === 1 ? "one layer" : unit.layers.length + " layers (" + unit.reason + ")"}.`;
  }

  function drawPins() {
    byId("pins").replaceChildren(...[...pins].map(([unit, scheme]) => {
      const item = document.createElement("li"), button = document.createElement("button");
      button.type = "button"; button.className = "plain";
      button.textContent = `${unit} = ${scheme} ×`;
      button.setAttribute("aria-label", `Unpin ${unit} from ${scheme}`);
      button.addEventListener("click", () => { pins.delete(unit); drawPins(); ask(true); });
      item.append(button);
      return item;
    }));
  }

  // --- asking: the newest question wins, one at a time ---------------------------------------
  let isAsking = false, isWaiting = null, settled = 0;
  async function ask(isFinal) {
    if (isAsking) { isWaiting = isWaiting || isFinal; isWaiting = isWaiting ?? false; return; }
    isAsking = true;
    const asked = conditions();
    const began = performance.now();
    let isAnswered = false;
    try {
      const answer = await fetch(`${base}/what-if?${asked}${isFinal ? "&proof=true" : ""}`);
      const body = await answer.json();
      if (answer.ok) { now = body; drawAnswer(); isAnswered = true; } else byId("said").textContent = body.detail || body.title || "The server did not answer.";
    } catch { byId("said").textContent = "The server does not answer: is it still running?"; }
    document.documentElement.dataset.drag = isAnswered ? String(Math.round(performance.now() - began)) : "failed";
    if (isFinal) {
      history.replaceState(null, "", asked.size ? `${base}?${asked}` : base);
      document.documentElement.dataset.settled = String(++settled);
      if (window.htmx && byId("prices")) htmx.ajax("GET", `${base}/prices?${asked}`, { target: "#prices", swap: "innerHTML" });
    }
    isAsking = false;
    if (isWaiting !== null) { const next = isWaiting; isWaiting = null; ask(next); }
  }

  for (const knob of knobs) {
    const start = now.costs.find((c) => c.name === knob.cost);
    const limit = (start && start.limit) || null;
    knob.on.checked = limit !== null;
    knob.limit = limit ?? knob.most;
    knob.slide.disabled = limit === null;
    knob.slide.value = String(toSlide(knob, knob.limit));
    const show = () => { knob.shown.textContent = knob.on.checked ? quantity(knob.limit, knob.unit) : "no limit"; };
    show();
    knob.slide.addEventListener("input", () => { knob.limit = toLimit(knob, Number(knob.slide.value)); show(); ask(false); });
    knob.slide.addEventListener("change", () => ask(true));
    knob.on.addEventListener("change", () => { knob.slide.disabled = !knob.on.checked; show(); ask(true); });
  }
  byId("risk").addEventListener("change", () => ask(true));
  byId("axis").addEventListener("change", drawFrontier);
  byId("unit").addEventListener("change", showUnit);
  byId("scheme").addEventListener("change", () => {
    const unit = view.units[Number(byId("unit").value)].name, scheme = byId("scheme").value;
    if (scheme) pins.set(unit, scheme); else pins.delete(unit);
    drawPins(); ask(true);
  });
  byId("reset").addEventListener("click", () => { location.href = base; });
  byId("copy").addEventListener("click", async () => {
    const texts = conditions().getAll("budget").map((t) => JSON.stringify(t)).join(", ");
    const kept = [...pins].map(([u, s]) => `${JSON.stringify(u)}: ${JSON.stringify(s)}`).join(", ");
    const risk = byId("risk").value ? `, risk=${byId("risk").value}` : "";
    const code = `import mpq\nfrom mpq.result import SearchResult\n\nresult = SearchResult(mpq.open_store(), ${JSON.stringify(form.dataset.run)})\nsolution = result.solve([${texts}]${kept ? `, pin={${kept}}` : ""}${risk})\nprint(solution.totals, dict(solution.allocation))\n`;
    try { await navigator.clipboard.writeText(code); byId("said").textContent = "Copied."; } catch { byId("said").textContent = code; }
  });
  for (const [unit, scheme] of Object.entries(now.pins)) pins.set(unit, scheme);
  makeBars(); drawPins(); drawAnswer(); drawFrontier();
});
