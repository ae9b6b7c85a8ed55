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
// Of a choice some browsers tell by one event, some by the other.
const listen = (draw, ...ids) => ids.forEach((id) => ["input", "change"].forEach((event) => $(id).addEventListener(event, () => draw())));
const union = (pick) => [...new Set(runs.flatMap((run) => Object.keys(pick(run))))];
const layout = (more) => ({ margin: { l: 65, r: 20, t: 15, b: 50 }, font: { size: 12 }, paper_bgcolor: "#fff", plot_bgcolor: "#fff", hovermode: "closest",
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
listen(drawTable, "filter");
$("all").onclick = () => { runs.forEach((run) => { run.shown = true; }); drawAll(); };
$("none").onclick = () => { runs.forEach((run) => { run.shown = false; }); drawAll(); };

