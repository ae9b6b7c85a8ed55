
// ---- curves: a panel each, all against the same axis
const axisNames = { step: "steps", images_seen: "images seen", "time/wall_s": "wall time (s)" };
const axes = Object.keys(axisNames).filter((name) => runs.some((run) => run.curves[name]));
const level = /^loss_by_log_snr\/(below_|above_)?(-?[\d.]+)/;
const lower = (name) => { const [, end, edge] = level.exec(name); return end === "below_" ? -Infinity : +edge; };
const allCurves = union((run) => run.curves).filter((name) => !axes.includes(name) && name !== "effective_batch"
  && runs.some((run) => (run.curves[name] || []).some((value) => value !== null)));
const curveNames = allCurves.filter((name) => !level.test(name));
const wantedCurves = ["train/loss", "val/loss", ...(data.main ? ["val/" + data.main] : []), "val/psnr", "train/grad_norm", "train/lr", "time/images_per_s"];
// A figure that was taken once is no curve: the table has it.
const isCurve = (name) => runs.some((run) => (run.curves[name] || []).filter((value) => value !== null).length > 1);
const drawnCurves = new Set(wantedCurves.filter((name) => curveNames.includes(name) && isCurve(name)).slice(0, 6));
if (!drawnCurves.size) curveNames.filter(isCurve).slice(0, 4).forEach((name) => drawnCurves.add(name));
$("curves").hidden = !curveNames.some(isCurve) || !axes.length;
$("curve-x").replaceChildren(...axes.map((name) => make("option", { value: name, textContent: axisNames[name] })));
$("curve-names").replaceChildren(...curveNames.map((name) => {
  const box = make("input", { type: "checkbox", checked: drawnCurves.has(name), name: "curve", value: name });
  box.onchange = () => { if (box.checked) drawnCurves.add(name); else drawnCurves.delete(name); drawCurves(); };
  return make("label", {}, box, " " + name);
}));
function smoothed(values, share) {
  let mean = null;
  return values.map((value) => { mean = mean === null ? value : share * mean + (1 - share) * value; return mean; });
}
function drawCurves() {
  if ($("curves").hidden) return;
  const x = $("curve-x").value, share = +$("smooth").value, type = $("curve-log").checked ? "log" : "linear";
  const holder = $("curve-plots");
  [...holder.children].filter((panel) => !drawnCurves.has(panel.dataset.curve)).forEach((panel) => { Plotly.purge(panel); panel.remove(); });
  const drawn = curveNames.filter((name) => drawnCurves.has(name));
  // All of them stand in their columns before any is drawn: a drawing takes the width that its panel has at that time.
  drawn.forEach((y) => {
    let panel = [...holder.children].find((each) => each.dataset.curve === y);
    if (!panel) { panel = make("div", { className: "plot" }); panel.dataset.curve = y; }
    holder.append(panel);
  });
  drawn.forEach((y) => {
    const panel = [...holder.children].find((each) => each.dataset.curve === y);
    const traces = shown().filter((run) => run.curves[y] && run.curves[x]).map((run) => {
      const rows = run.curves[y].map((value, at) => [run.curves[x][at], value]).filter(([a, b]) => a !== null && b !== null);
      return { type: "scatter", mode: rows.length < 40 ? "lines+markers" : "lines", name: run.name, line: { color: run.colour, width: 1.6 }, marker: { size: 4 },
        x: rows.map((row) => row[0]), y: smoothed(rows.map((row) => row[1]), share), hovertemplate: "%{y:.4g} at %{x}<extra>%{fullData.name}</extra>" };
    });
    Plotly.react(panel, traces, layout({ margin: { l: 60, r: 15, t: 32, b: 42 }, title: { text: y, x: 0.02, xanchor: "left", font: { size: 13 } },
      xaxis: { title: { text: axisNames[x] } }, yaxis: { type, exponentformat: "power" }, showlegend: false }), quiet);
  });
}
listen(drawCurves, "curve-x", "smooth", "curve-log");

// ---- loss by noise level, over training
const levels = allCurves.filter((name) => level.test(name)).sort((a, b) => lower(a) - lower(b));
const heated = () => shown().filter((run) => levels.some((name) => run.curves[name]));
$("heat").hidden = levels.length < 2;
options($("heat-run"), runs.filter((run) => levels.some((name) => run.curves[name])).map((run) => run.name));
function drawHeat() {
  if ($("heat").hidden) return;
  const run = runs.find((each) => each.name === $("heat-run").value) || heated()[0], x = $("curve-x").value;
  const rows = run.curves[x].map((_, at) => at).filter((at) => run.curves[x][at] !== null && levels.some((name) => (run.curves[name] || [])[at] != null));
  const relative = $("heat-relative").checked;
  const z = levels.map((name) => {
    const own = rows.map((at) => (run.curves[name] || [])[at] ?? null), first = own.find((value) => value !== null);
    return relative ? own.map((value) => (value === null ? null : value / first)) : own;
  });
  const ends = levels.map((name) => name.split("/")[1].replaceAll("_", " "));
  const heat = { type: "heatmap", z: z.map((row) => row.map((value) => (value > 0 ? Math.log10(value) : null))), x: rows.map((at) => run.curves[x][at]), y: ends,
    customdata: z, colorscale: "Viridis", hovertemplate: "%{x}, log-SNR %{y}: %{customdata:.4g}<extra></extra>",
    colorbar: { title: { text: relative ? "log10 of the ratio" : "log10 loss" } } };
  Plotly.react("heat-plot", [heat], layout({ margin: { l: 90, r: 20, t: 15, b: 50 }, xaxis: { title: { text: axisNames[x] } }, yaxis: { title: { text: "log-SNR" }, type: "category" } }), quiet);
}
listen(drawHeat, "heat-run", "heat-relative");
listen(drawHeat, "curve-x");

// ---- quality against cost
const distinct = (name) => new Set(runs.map((run) => run.figures[name]).filter((value) => value !== undefined)).size;
const costs = ["nfe", "train_time_s", "wall_time_s", "images_seen", "parameters", "flops", "steps"].filter((name) => figureNames.includes(name));
const qualities = figureNames.filter((name) => !costs.includes(name) && !/_(low|high|se|std)$/.test(name));
$("trade").hidden = runs.length < 2 || !costs.length || !qualities.length;
options($("trade-y"), qualities, data.main);
// A cost that all runs have in common tells nothing: the first that differs.
options($("trade-x"), costs, costs.find((name) => distinct(name) > 1) || costs[0]);
const values = (key) => new Set(runs.map((run) => told(run.config[key]))).size;
const grouping = data.differing.find((key) => key === "asked: sampler") || data.differing.find((key) => values(key) > 1 && values(key) <= palette.length) || "run";
options($("trade-colour"), ["run", ...data.differing], grouping);
$("trade-join").checked = $("trade-x").value === "nfe";
function front(points, larger) {
  const sign = larger ? -1 : 1, kept = [];
  [...points].sort((a, b) => a.x - b.x || sign * (a.y - b.y)).forEach((point) => {
    if (!kept.length || sign * point.y < sign * kept[kept.length - 1].y) kept.push(point);
  });
  return kept;
}
function drawTrade() {
  if ($("trade").hidden) return;
  const y = $("trade-y").value, x = $("trade-x").value, by = $("trade-colour").value;
  const points = shown().filter((run) => run.figures[x] !== undefined && run.figures[y] !== undefined).map((run) => ({ x: run.figures[x], y: run.figures[y],
    low: run.figures[y + "_low"] ?? run.figures[y], high: run.figures[y + "_high"] ?? run.figures[y], run, group: by === "run" ? run.name : told(run.config[by]) }));
  const groups = [...new Set(points.map((point) => point.group))];
  const said = (run) => [run.name, ...data.differing.filter((key) => run.config[key] !== undefined).slice(0, 8).map((key) => `${key.replace("asked: ", "")} ${told(run.config[key])}`)].join("<br>");
  const traces = groups.map((group, at) => {
    const own = points.filter((point) => point.group === group).sort((a, b) => a.x - b.x), colour = palette[at % palette.length];
    return { type: "scatter", mode: $("trade-join").checked ? "lines+markers" : "markers", name: by === "run" ? group : `${by.replace("asked: ", "")} = ${group}`,
      marker: { size: 10, color: colour }, line: { color: colour, width: 1 }, x: own.map((point) => point.x), y: own.map((point) => point.y), text: own.map((point) => said(point.run)),
      error_y: { type: "data", symmetric: false, thickness: 1, width: 3, color: colour, visible: own.some((point) => point.high > point.low),
        array: own.map((point) => point.high - point.y), arrayminus: own.map((point) => point.y - point.low) },
      hovertemplate: "%{text}<br><b>%{x}, %{y:.4g}</b><extra></extra>" };
  });
  const best = front(points, $("trade-better").checked);
  traces.unshift({ type: "scatter", mode: "lines", name: "Pareto front", x: best.map((p) => p.x), y: best.map((p) => p.y),
    line: { color: "#99a", dash: "dot", shape: "hv" }, hoverinfo: "skip" });
  Plotly.react("trade-plot", traces, layout({ xaxis: { title: { text: x }, type: $("trade-logx").checked ? "log" : "linear", exponentformat: "none" },
    yaxis: { title: { text: y }, type: $("trade-logy").checked ? "log" : "linear" }, showlegend: traces.length < 14 }), quiet);
}
listen(drawTrade, "trade-y", "trade-x", "trade-colour", "trade-logx", "trade-logy", "trade-join", "trade-better");

// ---- parallel coordinates
$("parallel").hidden = runs.length < 3 || !data.differing.length || !qualities.length;
options($("parallel-y"), qualities, data.main);
function dimension(label, values) {
  const numbers = values.every((value) => typeof value === "number"), found = [...new Set(values.map(told))];
  if (numbers && found.length > 6) return { label, values };
  const order = numbers ? [...new Set(values)].sort((a, b) => a - b).map(told) : found.sort();
  return { label, values: values.map((value) => order.indexOf(told(value))), tickvals: order.map((_, at) => at), ticktext: order, range: [-0.3, order.length - 0.7] };
}
function drawParallel() {
  if ($("parallel").hidden) return;
  const y = $("parallel-y").value, own = shown().filter((run) => run.figures[y] !== undefined);
  const keys = data.differing.filter((key) => values(key) > 1).slice(0, 9);
  const dimensions = [...keys.map((key) => dimension(key.replace("asked: ", ""), own.map((run) => run.config[key]))), { label: y, values: own.map((run) => run.figures[y]) }];
  const line = { color: own.map((run) => run.figures[y]), colorscale: "Viridis", showscale: true };
  Plotly.react("parallel-plot", own.length ? [{ type: "parcoords", line, dimensions, labelfont: { size: 13 }, tickfont: { size: 12 } }] : [], layout({ margin: { l: 110, r: 60, t: 60, b: 30 } }), quiet);
}
listen(drawParallel, "parallel-y");
