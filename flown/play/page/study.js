// What is generated at the press of the button: networks that vote, and what is known of them.

import { STEPS } from "./generator.js";
import * as heads from "./heads.js";
import { normals, shuffled } from "./random.js";

const ALARMS = 0.05; // of the things themselves may be called none of these
const JUDGES = 5; // networks whose distances tell what is none of these

/** Lets the page paint. */
const pause = () => new Promise((go) => setTimeout(go));

/**
 * Generates networks for images and labels, the first one as soon as it can be.
 *
 * `tell(part, words, study)` is called on the way, `stopped()` asked whether to go on. A study has
 * `support`, `networks`, `frames` (a network by t, with its latents), `held` (the share of held-back
 * examples that are right, by t), `fair` (the same at t = 1 after labels were shuffled), `limit`.
 */
export async function study(generator, { images, labels }, count, tell, stopped) {
  const began = performance.now();
  const support = await generator.see(images, labels);
  const path = await generator.path(support, 0);
  const found = { support, networks: [], frames: [] };
  found.networks.push(await generator.network(path[STEPS], support, 0));
  found.frames[STEPS] = { x: path[STEPS], network: found.networks[0] };
  found.milliseconds = performance.now() - began;
  const rounds = Math.min(10, Math.max(...heads.turns(labels)));
  const work = STEPS + (count - 1) + 2 * rounds;
  let done = 0;
  const step = async (words) => {
    tell(done++ / work, words, found);
    await pause();
    return stopped();
  };
  for (let i = 0; i < STEPS; i++) {
    if (await step("The way from noise …")) return null;
    found.frames[i] = { x: path[i], network: await generator.network(path[i], support, 0) };
  }
  for (let i = 1; i < count; i++) {
    if (await step(`Network ${i + 1} of ${count} …`)) return null;
    const end = (await generator.path(support, i)).at(-1);
    found.networks.push(await generator.network(end, support, i));
  }
  found.judges = found.networks.slice(0, JUDGES);
  if (!rounds) return found;
  const order = shuffled(labels.length, normals(7));
  const wrong = order.map((i) => labels[i]);
  const right = new Array(STEPS + 1).fill(0);
  const far = [];
  let [fair, all] = [0, 0];
  for (let round = 1; round <= rounds; round++) {
    if (await step(`Examples held back, ${round} of ${rounds} …`)) return null;
    const [seen, out] = split(images, labels, heads.turns(labels), round);
    const rest = await generator.see(seen.images, seen.labels);
    const judges = [];
    for (let i = 0; i < found.judges.length; i++) {
      const way = await generator.path(rest, i);
      for (let t = i ? STEPS : 0; t <= STEPS; t++) {
        const network = await generator.network(way[t], rest, i);
        if (t === STEPS) judges.push(network);
        if (!i) right[t] += await hits(generator, [network], rest, out);
      }
      await pause();
    }
    const features = await generator.features(judges, rest, out.images);
    far.push(...generator.distances(judges, rest, features));
    all += out.labels.length;
    if (await step(`The same with shuffled labels, ${round} of ${rounds} …`)) return null;
    fair += await unfair(generator, images, labels, wrong, round);
  }
  found.held = right.map((value) => value / all);
  found.fair = fair / all;
  found.heldBack = all;
  found.limit = heads.limit(far, ALARMS);
  return found;
}

/** Images that stay and images that are held back in a round. */
function split(images, labels, turns, round) {
  const part = (kept) => {
    const rows = turns.flatMap((turn, i) => ((turn === round) === kept ? [] : [i]));
    return { images: rows.map((i) => images[i]), labels: rows.map((i) => labels[i]) };
  };
  return [part(true), part(false)];
}

async function hits(generator, networks, support, out) {
  const features = await generator.features(networks, support, out.images);
  const p = generator.classify(networks, support, features);
  return p.filter((row, i) => row.indexOf(Math.max(...row)) === out.labels[i]).length;
}

/** How many held-back images a network calls right that was generated from shuffled labels. */
async function unfair(generator, images, labels, wrong, round) {
  const [, out] = split(images, labels, heads.turns(labels), round);
  const [seen] = split(images, wrong, heads.turns(labels), round);
  const ways = Math.max(...labels) + 1;
  if (new Set(seen.labels).size < ways) return out.labels.length / ways; // a class is gone: a guess
  const rest = await generator.see(seen.images, seen.labels);
  const network = await generator.network((await generator.path(rest, 0)).at(-1), rest, 0);
  return hits(generator, [network], rest, out);
}
