// The page: what is on it, and what happens when someone gives it a picture.

import { readLabels } from "./png.js";
import { get, getFile, Refusal, segment, sentence } from "./request.js";

const SCALES = [0.5, 0.75, 1, 1.25, 1.5, 1.75];
const DIMMED = 36; // alpha of the classes beside the one looked at, 0..255
const COARSE = 320; // masks narrower than this, in pixels, are shown with hard pixel edges
const LARGEST_CANVAS = 65535; // pixels of a side that browsers draw
const STEP = 1 / 50; // of the longer side, for one press of an arrow key
const PHASES = { infer: "inference" };

const $ = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const images = [...document.querySelectorAll(".pane img")];
const spots = [...document.querySelectorAll(".spot")];
const panes = [...document.querySelectorAll(".pane")];
const canvas = $("colours");

const page = {
  asked: "", // the name by which the service knows the model; none where it has but one
  model: null, // {name, sha256}
  classes: [], // {id, name, color} by id
  settings: null,
  picture: null, // the File to segment
  shown: false, // whether the browser can show it as the service reads it
  result: null, // {answer, labels, file, elapsed}
  running: null, // AbortController
  wanted: null, // the sample that is being fetched
  pinned: null, // class ids
  hovered: null,
  point: null, // [x, y] in the mask's pixels
  everyRow: false,
};

// ---- small things

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const cssColour = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

function swatch(id) {
  const mark = make("i", { className: "swatch" });
  mark.style.background = cssColour(colourOf(id));
  return mark;
}

const nameOf = (id) => page.classes[id]?.name.replaceAll("_", " ") ?? `class ${id}`;
const colourOf = (id) => page.classes[id]?.color ?? [255, 0, 255];

function percent(fraction) {
  if (fraction === 0) {
    return "0 %";
  }
  return fraction < 0.001 ? "< 0.1 %" : `${(100 * fraction).toFixed(1)} %`;
}

function milliseconds(ms) {
  return ms >= 999.5 ? `${(ms / 1000).toFixed(2)} s` : ms >= 9.95 ? `${Math.round(ms)} ms` : `${ms.toFixed(1)} ms`;
}

const say = (words) => ($("status").textContent = words);

function complain(words, again = false) {
  $("error-text").textContent = words;
  $("again").hidden = !again;
  $("error").hidden = false;
}

function settle() {
  $("error").hidden = true;
  $("error-text").textContent = "";
}

function save(blob, suffix) {
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: page.picture.name.replace(/\.[^.]*$/, "") + suffix }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// ---- from a picture to a result

async function take(file) {
  page.wanted = null;
  page.running?.abort();
  page.running = null;
  busy(false);
  settle();
  forget();
  if (file.size > page.settings.max_bytes) {
    const [has, most] = [file.size, page.settings.max_bytes].map((bytes) => (bytes / 2 ** 20).toFixed(1));
    welcome();
    complain(`${file.name} has ${has} MB; this service takes at most ${most} MB.`);
    return;
  }
  page.picture = file;
  await run(show(file));
}

/** Back to a page without a picture. */
function forget() {
  Object.assign(page, { picture: null, shown: false });
  withdraw();
}

/** Back to a page without a result. */
function withdraw() {
  Object.assign(page, { result: null, pinned: null, hovered: null, everyRow: false });
  point(null);
  for (const id of ["legend", "time", "note", "run"]) {
    $(id).hidden = true;
  }
  $("knows").hidden = false;
  document.body.classList.remove("answered");
  canvas.width = canvas.height = 1;
  say("");
}

function welcome() {
  $("welcome").hidden = false;
  for (const id of ["panes", "tools"]) {
    hide(id, $("welcome").querySelector(".choose"));
  }
}

/** Hide an element; a focus inside it moves on, by default to the picture, and not to nowhere. */
function hide(id, next = $("blend")) {
  if ($(id).contains(document.activeElement)) {
    next.focus({ preventScroll: true });
  }
  $(id).hidden = true;
}

/** Put the picture on the page; afterwards `page.shown` says whether the browser could. */
async function show(file) {
  const url = URL.createObjectURL(file);
  try {
    await Promise.all(
      images.map((image) => {
        image.src = url;
        return image.decode();
      }),
    );
    if (page.picture === file) {
      page.shown = true;
      document.body.classList.remove("blind");
      shape(images[0].naturalWidth, images[0].naturalHeight);
    }
  } catch {
    if (page.picture === file) {
      document.body.classList.add("blind");
      shape(3, 2);
    }
  } finally {
    URL.revokeObjectURL(url);
  }
}

/** Give the panes the picture's proportions, within what a screen can hold. */
function shape(width, height) {
  $("panes").style.setProperty("--ratio", Math.min(6, Math.max(1 / 3, width / height)));
}

/** Segment the picture with the options on the page. `showing` settles once the picture is on the page. */
async function run(showing = Promise.resolve()) {
  const { picture } = page;
  page.running?.abort();
  const running = (page.running = new AbortController());
  settle();
  $("panes").hidden = $("tools").hidden = false;
  hide("welcome");
  busy(true);
  say(`Segmenting ${picture.name} …`);
  try {
    const { answer, elapsed } = await segment(picture, options(), running.signal);
    const file = Uint8Array.from(atob(answer.mask.data), (letter) => letter.charCodeAt(0));
    const labels = await readLabels(file);
    if (answer.model.sha256 !== page.model.sha256) {
      await meetModel(); // the service has another one since this page was opened
    }
    await showing;
    if (page.running === running) {
      page.result = { answer, labels, file, elapsed };
      present();
    }
  } catch (error) {
    await showing;
    if (page.running === running) {
      fail(error);
    }
  } finally {
    if (page.running === running) {
      page.running = null;
      busy(false);
      offerRun();
    }
  }
}

function fail(error) {
  if (error.name === "AbortError") {
    say("Cancelled.");
  } else {
    say("");
    complain(sentence(error.message), error instanceof Refusal && error.again);
  }
  if (!page.shown && !page.result) {
    page.picture = error.again ? page.picture : null;
    welcome();
  }
}

let ticking = 0;

function busy(on) {
  clearInterval(ticking);
  if (on) {
    $("progress").hidden = false;
    hide("run");
  } else {
    hide("progress");
  }
  $("blend").setAttribute("aria-busy", on);
  if (on) {
    const began = performance.now();
    const tick = () => ($("elapsed").textContent = `${((performance.now() - began) / 1000).toFixed(1)} s`);
    tick();
    ticking = setInterval(tick, 100);
  }
}

/** Show `page.result`. */
function present() {
  const { answer, labels, elapsed } = page.result;
  const { width, height } = answer.image;
  page.shown &&= isUpright(answer.image);
  document.body.classList.toggle("blind", !page.shown);
  const drawn = Math.max(labels.width, labels.height) <= LARGEST_CANVAS;
  $("note").hidden = page.shown && drawn;
  $("note").textContent = drawn
    ? "This browser cannot show the picture as the service reads it; here are the colours alone."
    : `A side of more than ${LARGEST_CANVAS} pixels is more than a browser draws; the mask can be saved.`;
  shape(width, height);
  canvas.width = labels.width;
  canvas.height = labels.height;
  canvas.classList.toggle("coarse", labels.width < COARSE);
  paint();
  if (!calm.matches) {
    canvas.animate([{ opacity: 0 }, {}], 350);
  }
  $("knows").hidden = true;
  document.body.classList.add("answered");
  for (const id of ["legend", "time"]) {
    $(id).hidden = false;
  }
  drawLegend();
  drawTime(answer.timing_ms, elapsed);
  const scales = answer.scales.map((scale) => +scale.toFixed(4)).join(", ");
  const turned = answer.image.exif_applied ? ", turned upright" : "";
  say(
    `${page.picture.name}: ${width} × ${height} pixels${turned}, ${answer.scales.length > 1 ? "scales" : "scale"} ${scales}${answer.flip ? ", mirrored too" : ""}.`,
  );
}

/** Whether the picture stands in this page as the service reads it; colours over one that does not would mislead. */
function isUpright({ width, height, exif_applied }) {
  const fits = images[0].naturalWidth === width && images[0].naturalHeight === height;
  return fits && (!exif_applied || page.picture.type === "image/jpeg"); // in other formats browsers may ignore EXIF
}

// ---- the colours over the picture

/** Paint the labels in their colours; a class that is looked at stands out, the others step back. */
function paint() {
  const { width, height, values } = page.result.labels;
  const looked = page.hovered ?? page.pinned;
  const colours = new Uint8ClampedArray(4 * 65536);
  for (const { id, color } of page.classes) {
    colours.set([...color, looked === null || looked === id ? 255 : DIMMED], 4 * id);
  }
  const words = new Uint32Array(colours.buffer);
  const image = new ImageData(width, height);
  const out = new Uint32Array(image.data.buffer);
  for (let i = 0; i < out.length; i++) {
    out[i] = words[values[i]];
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  for (const row of $("rows").rows) {
    row.classList.toggle("looked", Number(row.dataset.id) === looked);
  }
}

function look(id) {
  if (id !== page.hovered) {
    page.hovered = id;
    requestAnimationFrame(() => page.result && paint());
  }
}

function setOpacity(value) {
  $("opacity").value = value;
  $("opacity-value").textContent = `${$("opacity").value} %`;
  canvas.style.setProperty("--opacity", $("opacity").value / 100);
}

function overlay() {
  const sheet = make("canvas", { width: canvas.width, height: canvas.height });
  const context = sheet.getContext("2d");
  if (page.shown) {
    context.fillStyle = "white"; // as the service reads what is transparent
    context.fillRect(0, 0, sheet.width, sheet.height);
    context.drawImage(images[0], 0, 0, sheet.width, sheet.height);
    context.globalAlpha = $("opacity").value / 100;
  }
  context.drawImage(canvas, 0, 0);
  return new Promise((done) => sheet.toBlob(done, "image/png"));
}

// ---- the class under the pointer

/** Where the picture lies in a pane (it keeps its proportions), in CSS pixels: [left, top, size of one mask pixel]. */
function placed(pane) {
  const { width, height } = page.result.labels;
  const size = Math.min(pane.clientWidth / width, pane.clientHeight / height);
  return [(pane.clientWidth - size * width) / 2, (pane.clientHeight - size * height) / 2, size];
}

function pointAt(event) {
  if (!page.result) {
    return null;
  }
  const pane = event.currentTarget;
  const box = pane.getBoundingClientRect();
  const [left, top, size] = placed(pane);
  const x = Math.floor((event.clientX - box.left - left) / size);
  const y = Math.floor((event.clientY - box.top - top) / size);
  const { width, height } = page.result.labels;
  return x >= 0 && y >= 0 && x < width && y < height ? [x, y] : null;
}

/** Name the class at a mask pixel beside it, in every pane; null takes the mark away. */
function point(at) {
  page.point = at;
  $("probe").hidden = !at;
  spots.forEach((spot) => (spot.hidden = !at));
  if (!at) {
    return;
  }
  const id = labelAt(at);
  $("probe-name").textContent = nameOf(id);
  $("probe").firstElementChild.style.background = cssColour(colourOf(id));
  for (const pane of panes) {
    if (pane.clientWidth) {
      const [left, top, size] = placed(pane);
      const x = left + (at[0] + 0.5) * size;
      const y = top + (at[1] + 0.5) * size;
      pane.style.setProperty("--x", `${x}px`);
      pane.style.setProperty("--y", `${y}px`);
      pane.classList.toggle("to-left", x > pane.clientWidth * 0.7);
      pane.classList.toggle("to-top", y > pane.clientHeight * 0.85);
    }
  }
}

const labelAt = ([x, y]) => page.result.labels.values[y * page.result.labels.width + x];

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function walk(event) {
  const way = ARROWS[event.key];
  if (!way || !page.result) {
    return;
  }
  event.preventDefault();
  const { width, height } = page.result.labels;
  const step = event.shiftKey ? 1 : Math.max(1, Math.round(Math.max(width, height) * STEP));
  const from = page.point ?? [Math.floor(width / 2), Math.floor(height / 2)];
  const x = Math.min(width - 1, Math.max(0, from[0] + way[0] * step));
  const y = Math.min(height - 1, Math.max(0, from[1] + way[1] * step));
  point([x, y]);
  $("spoken").textContent = `${nameOf(labelAt([x, y]))} at ${x}, ${y}`;
}

// ---- legend

function drawLegend() {
  const rows = [...page.result.answer.presence].sort((a, b) => b.pixels - a.pixels || b.score - a.score);
  $("rows").replaceChildren(...rows.map(legendRow));
  drawThreshold();
}

function legendRow(row) {
  const button = make("button", { type: "button" }, swatch(row.id), nameOf(row.id));
  button.ariaPressed = "false";
  button.title = "Show this class alone";
  button.addEventListener("click", () => pin(row.id));
  const bar = make("span", { className: "score-bar" }, make("i"));
  bar.firstChild.style.width = `${100 * row.score}%`;
  bar.firstChild.style.background = cssColour(colourOf(row.id));
  const line = make(
    "tr",
    {},
    make("th", { scope: "row" }, button),
    make("td", { className: "amount number", title: `${row.pixels.toLocaleString("en")} pixels` }, percent(row.fraction)),
    make("td", { className: "presence" }, bar, make("span", { className: "number" }, row.score.toFixed(2))),
  );
  Object.assign(line.dataset, { id: row.id, score: row.score, pixels: row.pixels });
  line.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && look(row.id));
  line.addEventListener("pointerleave", () => look(null));
  return line;
}

function pin(id) {
  page.pinned = page.pinned === id ? null : id;
  page.hovered = null;
  for (const row of $("rows").rows) {
    row.querySelector("button").ariaPressed = String(Number(row.dataset.id) === page.pinned);
  }
  paint();
}

/** Everything that hangs on the threshold: which rows count as present, and which are worth a line. */
function drawThreshold() {
  const threshold = Number($("threshold").value);
  $("threshold-value").textContent = threshold.toFixed(2);
  $("legend").style.setProperty("--threshold", threshold);
  let [present, rest] = [0, 0];
  for (const row of $("rows").rows) {
    const isPresent = Number(row.dataset.score) >= threshold;
    const idle = !isPresent && row.dataset.pixels === "0";
    present += isPresent;
    rest += idle;
    row.classList.toggle("absent", !isPresent);
    row.hidden = idle && !page.everyRow;
  }
  const all = page.classes.length;
  $("summary").textContent = `${present} of ${all} ${all === 1 ? "class is" : "classes are"} present.`;
  $("rest").hidden = rest === 0;
  $("rest").ariaExpanded = String(page.everyRow);
  $("rest").textContent = page.everyRow ? "Hide those not in this picture" : `Show ${rest} not in this picture`;
}

// ---- time

function drawTime(timing, elapsed) {
  const phases = Object.entries(timing).filter(([name]) => name !== "total");
  const known = phases.reduce((sum, [, ms]) => sum + ms, 0);
  phases.push(["transfer", Math.max(0, elapsed - known)]);
  $("total").textContent = milliseconds(elapsed);
  $("bar").replaceChildren(
    ...phases.map(([name, ms]) => {
      const part = make("span", { className: `phase ${name}` });
      part.style.flexGrow = ms;
      return part;
    }),
  );
  $("phases").replaceChildren(
    ...phases.map(([name, ms]) =>
      make(
        "div",
        {},
        make("dt", {}, make("i", { className: `phase ${name}` }), PHASES[name] ?? name),
        make("dd", { className: "number" }, milliseconds(ms)),
      ),
    ),
  );
}

// ---- options

const boxes = () => [...$("scales").querySelectorAll("input")];

function options() {
  return {
    model: page.asked,
    scales: boxes()
      .filter((box) => box.checked)
      .map((box) => Number(box.value)),
    flip: $("flip").checked,
  };
}

function drawOptions({ min_scale, max_scale, scales, flip }) {
  const offered = [...new Set([...SCALES.filter((scale) => scale >= min_scale && scale <= max_scale), ...scales])];
  offered.sort((a, b) => a - b);
  $("scales").replaceChildren(
    ...offered.map((scale) => {
      const box = make("input", { type: "checkbox", value: scale, checked: scales.includes(scale) });
      return make("label", { className: "chip" }, box, make("span", { className: "number" }, String(scale)));
    }),
  );
  $("flip").checked = flip;
  optionsChanged();
}

function optionsChanged(event) {
  const most = page.settings.max_scales;
  if (most === 1 && boxes().includes(event?.target)) {
    boxes().forEach((box) => (box.checked = box === event.target));
  }
  const { scales, flip } = options();
  if (scales.length === 0) {
    event.target.checked = true; // one view there must be
    return optionsChanged(event);
  }
  for (const box of boxes()) {
    box.disabled = most > 1 && !box.checked && scales.length >= most;
  }
  const views = scales.length * (flip ? 2 : 1);
  $("views").textContent = views === 1 ? "One view of the picture." : `${views} views, averaged: about ${views} times the work of one.`;
  offerRun();
}

/** The button that runs again is there when there is something new to run. */
function offerRun() {
  const used = page.result?.answer;
  const { scales, flip } = options();
  const same =
    used && used.flip === flip && used.scales.map((s) => s.toFixed(3)).join() === scales.map((s) => s.toFixed(3)).join();
  $("run").hidden = !page.picture || Boolean(page.running) || Boolean(same);
  $("run").textContent = used ? "Segment again" : "Segment";
}

// ---- wiring

function choose() {
  $("file").value = "";
  $("file").click();
}

function takeFirst(files) {
  const [file] = files;
  take(file);
  if (files.length > 1 && page.picture === file) {
    complain(`One picture at a time: of these ${files.length} files ${file.name} is segmented.`);
  }
}

async function takeSample(sample) {
  page.wanted = sample;
  try {
    const file = new File([await getFile(sample.url)], sample.name, { type: "image/jpeg" });
    if (page.wanted === sample) {
      await take(file);
    }
  } catch (error) {
    if (page.wanted === sample) {
      complain(sentence(error.message));
    }
  }
}

function sideBySide(on) {
  $("panes").classList.toggle("two", on);
  $("one").ariaPressed = String(!on);
  $("two").ariaPressed = String(on);
  point(null);
}

const peek = (on) => document.body.classList.toggle("peek", on);
const saveMask = () => save(new Blob([page.result.file], { type: "image/png" }), ".mask.png");

async function saveOverlay() {
  const blob = await overlay();
  if (blob) {
    save(blob, ".overlay.png");
  } else {
    complain("The picture is too large for this browser to draw; the mask can be saved.");
  }
}

const KEYS = {
  o: choose,
  "-": () => setOpacity(Number($("opacity").value) - 10),
  "+": () => setOpacity(Number($("opacity").value) + 10),
  "=": () => setOpacity(Number($("opacity").value) + 10), // the same key without Shift
};
const KEYS_WITH_RESULT = {
  p: () => peek(true),
  s: () => sideBySide(!$("panes").classList.contains("two")),
  m: saveMask,
  d: saveOverlay,
};

function key(event) {
  if (event.key === "Escape") {
    if (page.running) {
      page.running.abort();
    } else {
      settle();
    }
  } else if (!event.target.matches("#key, #models") && !event.ctrlKey && !event.metaKey && !event.altKey && !event.repeat) {
    const pressed = event.key.toLowerCase();
    (KEYS[pressed] ?? (page.result && KEYS_WITH_RESULT[pressed]))?.();
  }
}

function wire() {
  document.querySelectorAll(".choose").forEach((button) => button.addEventListener("click", choose));
  $("file").addEventListener("change", () => $("file").files.length && takeFirst($("file").files));
  $("dismiss").addEventListener("click", settle);
  $("again").addEventListener("click", () => run());
  $("run").addEventListener("click", () => run());
  $("cancel").addEventListener("click", () => page.running?.abort());
  $("opacity").addEventListener("input", () => setOpacity($("opacity").value));
  $("threshold").addEventListener("input", drawThreshold);
  $("rest").addEventListener("click", () => {
    page.everyRow = !page.everyRow;
    drawThreshold();
  });
  $("scales").addEventListener("change", optionsChanged);
  $("flip").addEventListener("change", optionsChanged);
  $("models").addEventListener("change", modelChosen);
  $("one").addEventListener("click", () => sideBySide(false));
  $("two").addEventListener("click", () => sideBySide(true));
  $("save-mask").addEventListener("click", saveMask);
  $("save-overlay").addEventListener("click", saveOverlay);
  for (const pane of panes) {
    pane.addEventListener("pointermove", (event) => point(pointAt(event)));
    pane.addEventListener("pointerdown", (event) => point(pointAt(event)));
    pane.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null));
  }
  $("blend").addEventListener("keydown", walk);
  $("blend").addEventListener("blur", () => point(null));
  addEventListener("resize", () => point(null));
  addEventListener("keydown", key);
  addEventListener("keyup", (event) => event.key.toLowerCase() === "p" && peek(false));
  addEventListener("blur", () => peek(false));
  addEventListener("paste", (event) => event.clipboardData.files.length && takeFirst(event.clipboardData.files));
  addEventListener("dragover", (event) => {
    event.preventDefault();
    $("drop").hidden = !event.dataTransfer.types.includes("Files");
  });
  addEventListener("dragleave", (event) => {
    $("drop").hidden = event.relatedTarget === null || $("drop").hidden;
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").hidden = true;
    if (event.dataTransfer.files.length) {
      takeFirst(event.dataTransfer.files);
    }
  });
}

function drawSamples(samples) {
  $("samples").hidden = samples.length === 0;
  $("sample-list").replaceChildren(
    ...samples.map((sample) => {
      const thumb = make("img", { src: sample.url, alt: "", loading: "lazy", draggable: false });
      const button = make("button", { type: "button" }, thumb, make("span", {}, sample.title));
      button.addEventListener("click", () => takeSample(sample));
      const credit = make("small", {}, make("a", { href: sample.source }, sample.credit), `, ${sample.licence}`);
      return make("li", {}, button, credit);
    }),
  );
}

/** Learn the classes of the model that the service has now, under the name that is asked for. */
async function meetModel() {
  const { asked } = page;
  const { model, classes } = await get(asked ? `classes?model=${encodeURIComponent(asked)}` : "classes");
  if (asked !== page.asked) {
    return; // another was chosen meanwhile
  }
  Object.assign(page, { model, classes });
  $("model").textContent = model.name;
  $("count").textContent = `${asked ? " " : ", "}${classes.length} classes`;
  $("class-list").replaceChildren(...classes.map(({ id }) => make("li", {}, swatch(id), nameOf(id))));
}

/** Let the person choose, where the service has several models. */
function drawModels(models) {
  if (models.length < 2) {
    return;
  }
  page.asked = models.find((model) => model.default).name;
  $("models").replaceChildren(
    ...models.map(({ name, state }) => make("option", { value: name, disabled: state === "unloaded" }, name)),
  );
  $("models").value = page.asked;
  $("models").hidden = false;
  $("model").hidden = true;
  $("count").textContent = ` ${page.classes.length} classes`;
}

/** Ask another model: what is on the page was said by the one before. */
async function modelChosen() {
  const asked = (page.asked = $("models").value);
  page.running?.abort();
  page.running = null;
  busy(false);
  settle();
  withdraw();
  try {
    await meetModel();
    if (page.asked === asked && page.picture && !page.running) {
      await run();
    }
  } catch (error) {
    if (page.asked === asked) {
      complain(sentence(error.message));
      offerRun();
    }
  }
}

async function start() {
  const [settings, samples] = await Promise.all([get("page/settings"), get("samples"), meetModel()]);
  drawModels((await get("models")).models);
  page.settings = settings;
  $("threshold").value = settings.threshold;
  setOpacity($("opacity").value);
  drawOptions(settings);
  drawSamples(samples);
  wire();
  document.body.classList.add("ready");
  const wanted = samples.find((sample) => sample.name === `${new URLSearchParams(location.search).get("sample")}.jpg`);
  if (wanted) {
    await takeSample(wanted);
  }
}

start().catch((error) => {
  complain(sentence(error.message), true);
  $("again").addEventListener("click", () => location.reload());
  $("dismiss").addEventListener("click", settle);
  document.querySelectorAll(".choose").forEach((button) => (button.disabled = true));
  for (const kind of ["dragover", "drop"]) {
    addEventListener(kind, (event) => event.preventDefault()); // or the browser would open the file
  }
});
