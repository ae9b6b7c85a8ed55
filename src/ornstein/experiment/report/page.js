"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const palette = ["#2456c7", "#d1495b", "#2a9d5c", "#e09f1f", "#7b4bb7", "#1795a8", "#8c564b", "#d264b6", "#6b7280", "#9db020"];
const runs = data.runs.map((run, at) => ({ ...run, colour: palette[at % palette.length], shown: run.status !== "damaged" }));
const shown = () => runs.filter((run) => run.shown);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const options = (select, names, chosen) => {
  select.replaceChildren(...names.map((name) => make("option", { value: name, textContent: name })));
  if (names.includes(chosen)) select.value = chosen;
};
const told = (value) => {
  if (value === null || value === undefined) return "";
  if (typeof value === "string" && /^[\w.]+\.[A-Z]\w*$/.test(value)) return value.slice(value.lastIndexOf(".") + 1);  // of a class, its name
  if (typeof value !== "number" || Number.isInteger(value)) return typeof value === "number" ? value.toLocaleString("en") : String(value);
  return Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(3) : String(+value.toPrecision(5));
};
const union = (pick) => [...new Set(runs.flatMap((run) => Object.keys(pick(run))))];
const layout = (more) => ({ margin: { l: 65, r: 20, t: 15, b: 50 }, paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "closest",
  legend: { orientation: "h", y: -0.18 }, ...more });
const quiet = { responsive: true, displaylogo: false };

// ---- head and failures
$("title").textContent = data.title;
const counts = {};
runs.forEach((run) => { counts[run.status] = (counts[run.status] || 0) + 1; });
data.failures.forEach(() => { counts["failed before it began"] = (counts["failed before it began"] || 0) + 1; });
$("counts").textContent = `${runs.length} run${runs.length === 1 ? "" : "s"}: `
  + Object.entries(counts).map(([status, count]) => `${count} ${status}`).join(", ") + `. Written ${data.written}.`;
const ill = [...runs.filter((run) => ["failed", "damaged", "interrupted"].includes(run.status)), ...data.failures];
$("failures").hidden = !ill.length;
$("failures").querySelector("ul").replaceChildren(...ill.map((run) =>
  make("li", {}, make("b", { textContent: run.name }), ` (${run.status}): ${run.reason || "no reason was written"}`)));

// ---- table
const figureNames = [...new Set([...data.headline, ...union((run) => run.figures)])], configNames = union((run) => run.config);
const columns = [
  { key: "run", pick: (run) => run.name }, { key: "status", pick: (run) => run.status },
  ...configNames.map((key) => ({ key, pick: (run) => run.config[key], on: data.differing.includes(key) })),
  ...figureNames.map((key) => ({ key, pick: (run) => run.figures[key], on: data.headline.includes(key), figure: true })),
];
columns.forEach((column, at) => { column.on = at < 2 || column.on; });
let sorting = { key: data.main || "run", down: false };
const compare = (a, b) => {
  const empty = (value) => value === null || value === undefined;
  if (empty(a) || empty(b)) return empty(a) - empty(b);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
};
function drawTable() {
  const visible = columns.filter((column) => column.on);
  $("table").tHead.replaceChildren(make("tr", {}, ...visible.map((column) => {
    const head = make("th", { textContent: column.key.replace("asked: ", ""), title: "sort by " + column.key });
    if (column.key === sorting.key) head.className = sorting.down ? "down" : "up";
    head.onclick = () => { sorting = { key: column.key, down: sorting.key === column.key && !sorting.down }; drawTable(); };
    return head;
  })));
  const by = columns.find((column) => column.key === sorting.key) || columns[0];
  const words = $("filter").value.toLowerCase();
  const rows = runs.filter((run) => visible.some((column) => String(column.pick(run) ?? "").toLowerCase().includes(words)));
  rows.sort((a, b) => {
    const order = compare(by.pick(a), by.pick(b));
    const missing = [a, b].some((run) => by.pick(run) === undefined || by.pick(run) === null);
    return sorting.down && !missing ? -order : order;
  });
  $("table").tBodies[0].replaceChildren(...rows.map((run) => {
    const row = make("tr", { className: run.shown ? "" : "off", title: "click to show or hide in the plots" }, ...visible.map((column) => {
      const value = column.pick(run);
      const cell = make("td", { textContent: told(value), className: typeof value === "number" ? "number" : "" });
      if (column.key === "run") { const dot = make("span", { className: "dot" }); dot.style.background = run.shown ? run.colour : "#ccd"; cell.prepend(dot); }
      if (column.key === "status") cell.className = run.status;
      return cell;
    }));
    row.onclick = () => { run.shown = !run.shown; drawAll(); };
    return row;
  }));
}
$("columns").replaceChildren(...columns.slice(2).map((column) => {
  const box = make("input", { type: "checkbox", checked: column.on });
  box.onchange = () => { column.on = box.checked; drawTable(); };
  return make("label", {}, box, " " + column.key);
}));
$("filter").oninput = drawTable;
$("all").onclick = () => { runs.forEach((run) => { run.shown = true; }); drawAll(); };
$("none").onclick = () => { runs.forEach((run) => { run.shown = false; }); drawAll(); };

// ---- curves
const axes = ["step", "images_seen", "time/wall_s"].filter((name) => runs.some((run) => run.curves[name]));
const curveNames = union((run) => run.curves).filter((name) => !axes.includes(name) && name !== "effective_batch");
$("curves").hidden = !curveNames.length || !axes.length;
options($("curve-y"), curveNames, curveNames.includes("val/loss") ? "val/loss" : "train/loss");
options($("curve-x"), axes, "step");
function smoothed(values, share) {
  let mean = null;
  return values.map((value) => { mean = mean === null ? value : share * mean + (1 - share) * value; return mean; });
}
function drawCurves() {
  if ($("curves").hidden) return;
  const y = $("curve-y").value, x = $("curve-x").value, share = +$("smooth").value;
  const traces = shown().filter((run) => run.curves[y] && run.curves[x]).map((run) => {
    const rows = run.curves[y].map((value, at) => [run.curves[x][at], value]).filter(([a, b]) => a !== null && b !== null);
    return { type: "scatter", mode: rows.length < 40 ? "lines+markers" : "lines", name: run.name, line: { color: run.colour },
      x: rows.map((row) => row[0]), y: smoothed(rows.map((row) => row[1]), share) };
  });
  const type = $("curve-log").checked ? "log" : "linear";
  Plotly.react("curve-plot", traces, layout({ xaxis: { title: { text: x } }, yaxis: { title: { text: y }, type }, showlegend: traces.length < 13 }), quiet);
}
["curve-y", "curve-x", "smooth", "curve-log"].forEach((id) => { $(id).oninput = drawCurves; });

// ---- quality against cost
const costs = ["nfe", "train_time_s", "wall_time_s", "images_seen", "parameters", "flops", "steps"].filter((name) => figureNames.includes(name));
const qualities = figureNames.filter((name) => !costs.includes(name));
$("trade").hidden = runs.length < 2 || !costs.length || !qualities.length;
options($("trade-y"), qualities, data.main);
options($("trade-x"), costs, costs[0]);
options($("trade-colour"), ["run", ...data.differing], data.differing[0] || "run");
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
  const points = shown().filter((run) => run.figures[x] !== undefined && run.figures[y] !== undefined)
    .map((run) => ({ x: run.figures[x], y: run.figures[y], run, group: by === "run" ? run.name : told(run.config[by]) }));
  const groups = [...new Set(points.map((point) => point.group))];
  const traces = groups.map((group, at) => {
    const own = points.filter((point) => point.group === group);
    return { type: "scatter", mode: "markers", name: by === "run" ? group : `${by.replace("asked: ", "")} = ${group}`, marker: { size: 11, color: palette[at % palette.length] },
      x: own.map((point) => point.x), y: own.map((point) => point.y), text: own.map((point) => point.run.name), hovertemplate: "%{text}<br>%{x}, %{y}<extra></extra>" };
  });
  const best = front(points, $("trade-better").checked);
  traces.unshift({ type: "scatter", mode: "lines", name: "Pareto front", x: best.map((p) => p.x), y: best.map((p) => p.y),
    line: { color: "#99a", dash: "dot", shape: "hv" }, hoverinfo: "skip" });
  Plotly.react("trade-plot", traces, layout({ xaxis: { title: { text: x }, type: $("trade-logx").checked ? "log" : "linear" },
    yaxis: { title: { text: y }, type: $("trade-logy").checked ? "log" : "linear" }, showlegend: traces.length < 14 }), quiet);
}
["trade-y", "trade-x", "trade-colour", "trade-logx", "trade-logy", "trade-better"].forEach((id) => { $(id).oninput = drawTrade; });

// ---- parallel coordinates
$("parallel").hidden = runs.length < 3 || !data.differing.length || !qualities.length;
options($("parallel-y"), qualities, data.main);
function dimension(label, values) {
  if (values.every((value) => typeof value === "number")) return { label, values };
  const words = [...new Set(values.map(told))].sort();
  return { label, values: values.map((value) => words.indexOf(told(value))), tickvals: words.map((_, at) => at), ticktext: words, range: [-0.3, words.length - 0.7] };
}
function drawParallel() {
  if ($("parallel").hidden) return;
  const y = $("parallel-y").value, own = shown().filter((run) => run.figures[y] !== undefined);
  const keys = data.differing.slice(0, 9);
  const dimensions = [...keys.map((key) => dimension(key.replace("asked: ", ""), own.map((run) => run.config[key]))), dimension(y, own.map((run) => run.figures[y]))];
  const line = { color: own.map((run) => run.figures[y]), colorscale: "Viridis", showscale: true };
  Plotly.react("parallel-plot", own.length ? [{ type: "parcoords", line, dimensions }] : [], layout({ margin: { l: 90, r: 60, t: 60, b: 30 } }), quiet);
}
$("parallel-y").oninput = drawParallel;

// ---- pictures
const kinds = [...new Set(runs.flatMap((run) => run.pictures.map((picture) => picture.kind)))];
$("pictures").hidden = !kinds.length;
options($("picture-kind"), kinds, "step");
const steps = () => [...new Set(runs.flatMap((run) => run.pictures.filter((p) => p.kind === $("picture-kind").value && p.step !== null).map((p) => p.step)))].sort((a, b) => a - b);
function chooseKind() {
  const slider = $("picture-step"), found = steps();
  slider.parentElement.hidden = found.length < 2;
  Object.assign(slider, { min: 0, max: Math.max(found.length - 1, 0), step: 1 });
  slider.value = found.length - 1;
  drawPictures();
}
function drawPictures() {
  if ($("pictures").hidden) return;
  const kind = $("picture-kind").value, found = steps(), step = found[+$("picture-step").value];
  $("picture-told").textContent = step === undefined ? "" : step;
  const figures = shown().map((run) => {
    const own = run.pictures.filter((picture) => picture.kind === kind && (picture.step === null || step === undefined || picture.step <= step));
    const picture = own[own.length - 1];
    if (!picture) return null;
    const figure = make("figure", {}, make("img", { src: picture.src, alt: `${run.name}, ${kind}` }),
      make("figcaption", { textContent: run.name + (picture.step === null ? "" : `, step ${picture.step}`) + (data.main && run.figures[data.main] !== undefined ? `, ${data.main} ${told(run.figures[data.main])}` : "") }));
    figure.style.width = $("picture-size").value + "px";
    return figure;
  });
  $("picture-grid").replaceChildren(...figures.filter(Boolean));
}
$("picture-kind").oninput = chooseKind;
["picture-step", "picture-size"].forEach((id) => { $(id).oninput = drawPictures; });

// ---- config
function drawConfig() {
  const words = $("config-filter").value.toLowerCase();
  const keys = configNames.filter((key) => key.toLowerCase().includes(words) && (!$("config-differing").checked || data.differing.includes(key)));
  $("config-table").tHead.replaceChildren(make("tr", {}, make("th", { textContent: "key" }), ...shown().map((run) => make("th", { textContent: run.name }))));
  $("config-table").tBodies[0].replaceChildren(...keys.map((key) =>
    make("tr", {}, make("td", { textContent: key }), ...shown().map((run) => make("td", { textContent: run.config[key] === null ? "null" : String(run.config[key] ?? ""), title: String(run.config[key] ?? "") })))));
}
$("config-differing").checked = runs.length > 1 && data.differing.length > 0;
["config-filter", "config-differing"].forEach((id) => { $(id).oninput = drawConfig; });

function drawAll() { drawTable(); drawCurves(); drawTrade(); drawParallel(); drawPictures(); drawConfig(); }
chooseKind();
drawAll();
document.body.dataset.ready = "true";
