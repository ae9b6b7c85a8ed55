
// ---- pictures
const kindNames = { step: "samples", first_samples: "samples (evaluated)", best_and_worst: "best and worst samples", trajectory: "denoising (strip)",
  "trajectory (film)": "denoising (film)", nearest_training_images: "nearest training images", codec: "reconstructions of the codec", schedule: "schedule" };
const found = new Set(runs.flatMap((run) => run.pictures.map((picture) => picture.kind)));
const kinds = [...Object.keys(kindNames).filter((kind) => found.has(kind)), ...[...found].filter((kind) => !kindNames[kind])];
$("pictures").hidden = !kinds.length;
$("picture-kind").replaceChildren(...kinds.map((kind) => make("option", { value: kind, textContent: kindNames[kind] || kind })));
$("left-out").hidden = !data.left_out;
$("left-out").textContent = `${data.left_out} pictures are left out, or the page would be too large: they are in the runs' folders.`;
// What sample number i looks like depends on the seed: grids of one seed can be compared tile by tile.
const seedOf = (run) => run.config["callbacks.sample_grid.seed"] ?? run.config.seed;
const seeds = [...new Set(runs.filter((run) => run.pictures.length).map(seedOf).filter((seed) => seed !== undefined).map(String))];
options($("picture-seed"), ["all", ...seeds], "all");
$("picture-seed").parentElement.hidden = seeds.length < 2;
const steps = () => [...new Set(runs.flatMap((run) => run.pictures.filter((p) => p.kind === $("picture-kind").value && p.step !== null).map((p) => p.step)))].sort((a, b) => a - b);
function chooseKind() {
  const slider = $("picture-step"), there = steps();
  slider.parentElement.hidden = there.length < 2;
  Object.assign(slider, { min: 0, max: Math.max(there.length - 1, 0), step: 1 });
  slider.value = there.length - 1;
  drawPictures();
}
function pictureOf(run, picture) {
  const film = picture.src.startsWith("data:video");
  const element = film ? make("video", { src: picture.src, autoplay: true, loop: true, muted: true, controls: true }) : make("img", { src: picture.src, alt: `${run.name}, ${picture.kind}` });
  // Small pictures stay sharp where they are enlarged; large ones are made smaller smoothly.
  if (!film) element.onload = () => element.classList.toggle("enlarged", element.clientWidth >= element.naturalWidth);
  const words = [run.name, ...data.differing.filter((key) => run.config[key] !== undefined).slice(0, 6).map((key) => `${key.replace("asked: ", "")} ${told(run.config[key])}`)];
  if (picture.step !== null) words.push(`step ${picture.step}`);
  const figure = data.main && run.figures[data.main] !== undefined ? make("b", { textContent: `${data.main} ${told(run.figures[data.main])} ` }) : "";
  const whole = make("figure", {}, element, make("figcaption", {}, figure, words.join(", ")));
  whole.style.width = $("picture-size").value + "px";
  whole.onclick = () => whole.classList.toggle("whole");
  return whole;
}
function drawPictures() {
  if ($("pictures").hidden) return;
  const kind = $("picture-kind").value, there = steps(), step = there[+$("picture-step").value], seed = $("picture-seed").value;
  $("picture-told").textContent = step === undefined ? "" : step;
  const order = [...shown()].sort((a, b) => compare(a.figures[data.main], b.figures[data.main]));
  const figures = order.filter((run) => seed === "all" || String(seedOf(run)) === seed).map((run) => {
    const own = run.pictures.filter((picture) => picture.kind === kind && (picture.step === null || step === undefined || picture.step <= step));
    return own.length ? pictureOf(run, own[own.length - 1]) : null;
  });
  $("picture-grid").replaceChildren(...figures.filter(Boolean));
}
listen(chooseKind, "picture-kind");
listen(drawPictures, "picture-seed", "picture-step", "picture-size");

// ---- config
function drawConfig() {
  const words = $("config-filter").value.toLowerCase();
  const keys = configNames.filter((key) => key.toLowerCase().includes(words) && (!$("config-differing").checked || data.differing.includes(key)));
  $("config-table").tHead.replaceChildren(make("tr", {}, make("th", { textContent: "key" }), ...shown().map((run) => make("th", { textContent: run.name }))));
  $("config-table").tBodies[0].replaceChildren(...keys.map((key) =>
    make("tr", {}, make("td", { textContent: key }), ...shown().map((run) => make("td", { textContent: run.config[key] === null ? "null" : String(run.config[key] ?? ""), title: String(run.config[key] ?? "") })))));
}
$("config-differing").checked = runs.length > 1 && data.differing.length > 0;
listen(drawConfig, "config-filter", "config-differing");

function drawAll() { drawTable(); drawCurves(); drawHeat(); drawTrade(); drawParallel(); drawPictures(); drawConfig(); }
chooseKind();
drawAll();
document.body.dataset.ready = "true";
