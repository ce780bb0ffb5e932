// The page: what is drawn goes to the generator, what it gives is shown.

import * as ort from "./ort/ort.wasm.min.mjs";
import { Classes, MOST } from "./classes.js";
import { Generator, STEPS } from "./generator.js";
import { drawn, read } from "./images.js";
import { Pad } from "./pad.js";
import { curve, filters, heat } from "./plots.js";
import { samples } from "./samples.js";
import { study } from "./study.js";

const $ = (id) => document.getElementById(id);
const percent = (share) => `${Math.round(100 * share)} %`;

let generator = null;
let shown = null; // the study whose networks answer
let running = 0; // number of the newest press: older ones stop
let asked = null; // the image that is classified

function say(words, problem = false) {
  $("status").textContent = words;
  $("status").classList.toggle("problem", problem);
}

const teacher = new Pad($("teacher"), "Pad for examples. Arrows move, space draws, Enter adds.", () => {}, add);
const asker = new Pad($("asker"), "Pad for a new drawing. Arrows move, space draws.", () => {
  asked = asker.strokes.length ? drawn(asker.strokes) : null;
  answer();
}, () => {});

const classes = new Classes($("classes"), changed, async (files, place) => {
  for (const file of files)
    try {
      classes.add({ image: await read(file), drawn: false }, place);
    } catch (error) {
      say(error.message, true);
    }
});

function changed() {
  $("target").textContent = classes.names[classes.chosen] ?? "";
  $("more").disabled = classes.entries.length === MOST;
  running++;
  if (generator) ready();
}

function ready() {
  $("progress").value = 0;
  const problem = classes.problem();
  $("generate").disabled = Boolean(problem);
  const fewest = Math.min(...classes.entries.map((entry) => entry.examples.length));
  if (problem) say(problem, classes.entries.some((entry) => entry.examples.length));
  else if (fewest < 2) say("Ready. With two of each or more it can also say “none of these”.");
  else say(shown ? "The examples changed: generate again." : "Ready.");
}

function add() {
  if (!teacher.strokes.length) return say("Draw something on the pad first.", true);
  classes.add({ image: drawn(teacher.strokes), drawn: true });
  teacher.clear();
}

async function generate() {
  const mine = ++running;
  const names = classes.names;
  $("generate").disabled = true;
  shown = null;
  try {
    const show = (found) => {
      if (shown === found) return;
      shown = Object.assign(found, { names });
      $("result").hidden = false;
      frame(STEPS);
      answer();
    };
    const found = await study(generator, classes.support(), Number($("count").value), (part, words, some) => {
      if (mine !== running) return;
      $("progress").value = part;
      say(words);
      show(some);
    }, () => mine !== running);
    if (!found || mine !== running) return;
    show(found);
    $("progress").value = 1;
    say(`The first network took ${(found.milliseconds / 1000).toFixed(2)} s. Draw a new one.`);
    await facts(found);
    await play();
  } catch (error) {
    if (mine === running) say(`${error.message}. The drawings are kept: change them and try again.`, true);
  } finally {
    if (mine === running) $("generate").disabled = false;
  }
}

async function facts(found) {
  const { held, fair, heldBack, networks, names } = found;
  const rows = [["networks that vote", networks.length]];
  if (held) {
    rows.push(["held-back examples right, one network", `${percent(held[STEPS])} of ${heldBack}`]);
    rows.push(["the same after labels were shuffled", percent(fair)]);
  }
  rows.push(["chance", percent(1 / names.length)]);
  const parts = rows.flatMap(([term, value]) => {
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    [dt.textContent, dd.textContent] = [term, value];
    return [dt, dd];
  });
  $("facts").replaceChildren(...parts);
  answer();
}

/** Shows the first network at a place on its way from noise. */
function frame(place) {
  $("time").value = place;
  $("now").textContent = (place / STEPS).toFixed(2);
  const found = shown?.frames[place];
  if (!found) return;
  const { numbers, layers } = generator.sizes;
  const tokens = found.x.length / numbers;
  const column = (i) => Float64Array.from({ length: tokens }, (_, j) => found.x[j * numbers + i]);
  heat($("latents"), Array.from({ length: numbers }, (_, i) => column(i)));
  const first = found.network.layers[layers[0]];
  filters($("filters"), first.data, first.dims);
  heat($("head"), found.network.head);
  if (!shown.held) return;
  curve($("curve"), shown.held, 1 / shown.names.length, place);
  $("curve").setAttribute("aria-label", `Held-back examples right: ${shown.held.map(percent).join(", ")}`);
}

async function play() {
  const mine = running;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  for (let place = still ? STEPS : 0; place <= STEPS; place++) {
    if (mine !== running) return;
    frame(place);
    await new Promise((go) => setTimeout(go, 180));
  }
}

async function answer() {
  const [found, image] = [shown, asked];
  if (!found || !image) {
    $("answer").textContent = found ? "Draw one of them, or something else." : "Generate networks first.";
    $("bars").replaceChildren();
    return;
  }
  const networks = [...found.networks]; // more may come meanwhile
  const seen = await generator.features(networks, found.support, [image]);
  if (image !== asked || found !== shown) return;
  const [p] = generator.classify(networks, found.support, seen);
  const none = found.limit && generator.distances(found.judges, found.support, seen)[0] > found.limit;
  const best = p.indexOf(Math.max(...p));
  $("answer").textContent = none
    ? `None of these (nearest: ${found.names[best]})`
    : `${found.names[best]}, ${percent(p[best])} sure`;
  Object.assign($("answer").dataset, { name: none ? "" : found.names[best], strokes: asker.strokes.length });
  const bars = found.names.map((name, c) => {
    const item = document.createElement("li");
    const [label, bar, value] = [0, 1, 2].map(() => document.createElement("span"));
    [label.textContent, label.title, value.textContent] = [name, name, percent(p[c])];
    bar.className = "bar";
    bar.style.width = `${100 * p[c]}%`;
    item.append(label, bar, value);
    return item;
  });
  $("bars").replaceChildren(...bars);
}

$("add").onclick = add;
$("clear").onclick = () => teacher.clear();
$("again").onclick = () => asker.clear();
$("more").onclick = () => classes.more();
$("reset").onclick = () => { shown = null; $("result").hidden = true; classes.reset(); answer(); };
$("sample").onclick = () => { classes.entries = samples(4); classes.choose(0); };
$("generate").onclick = generate;
$("play").onclick = play;
$("time").oninput = () => frame(Number($("time").value));
$("ask").onchange = async () => {
  try {
    asked = await read($("ask").files[0]);
    answer();
  } catch (error) {
    $("answer").textContent = error.message;
  }
  $("ask").value = "";
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => frame(Number($("time").value)));

classes.reset();
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
Generator.load(ort).then(
  (loaded) => { generator = loaded; ready(); },
  (error) => say(`The generator did not load: ${error.message}`, true),
);
