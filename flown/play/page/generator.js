// Networks for a support set, from noise: flown/anytask/model.py, its graphs run by onnxruntime-web.

import * as heads from "./heads.js";
import { SIDE, warped } from "./images.js";
import { normals } from "./random.js";

const PIXELS = 3 * SIDE * SIDE;
const WEIGHTS = "generator.safetensors";
export const STEPS = 8; // of Euler, from noise to a network

/** Rows (n, F) of a flat array. */
const rowsOf = (flat, width) =>
  Array.from({ length: flat.length / width }, (_, i) =>
    Float64Array.from(flat.subarray(i * width, (i + 1) * width)),
  );

export class Generator {
  /** Loads the runtime, the graphs and the weights; nothing but what lies beside the page. */
  static async load(ort) {
    const bytes = async (name) => {
      const answer = await fetch(name);
      if (!answer.ok) throw new Error(`${name} is missing beside this page (${answer.status})`);
      return answer;
    };
    const made = new Generator();
    made.tensor = (data, dims) => new ort.Tensor("float32", data, dims);
    made.sizes = await (await bytes("page.json")).json();
    const weights = new Uint8Array(await (await bytes(WEIGHTS)).arrayBuffer());
    for (const name of ["see", "end", "write", "compute"]) {
      const graph = new Uint8Array(await (await bytes(`${name}.onnx`)).arrayBuffer());
      made[`${name}Graph`] = await ort.InferenceSession.create(graph, {
        externalData: [{ path: WEIGHTS, data: weights }],
        logSeverityLevel: 3,
      });
    }
    await made.warm();
    return made;
  }

  /** Generates a network for nothing, so that the first one that is asked for finds all compiled. */
  async warm() {
    const images = [0, 1, 2, 3].map((i) => new Float32Array(PIXELS).fill(i / 4));
    const support = await this.see(images, [0, 0, 1, 1]);
    await this.network((await this.path(support, 0))[STEPS], support, 0);
  }

  /** What is the same for all networks of a support set: images in its units, tokens, shares. */
  async see(images, labels) {
    const ways = Math.max(...labels) + 1;
    const bright = images.map((image) => image.reduce((sum, value) => sum + value, 0));
    const order = images.map((_, i) => i).sort((a, b) => bright[a] - bright[b]);
    const support = { ways, labels: order.map((i) => labels[i]), raw: order.map((i) => images[i]) };
    const count = images.length * PIXELS;
    support.mean = bright.reduce((sum, value) => sum + value, 0) / count;
    const squares = images.reduce(
      (sum, image) => sum + image.reduce((s, value) => s + (value - support.mean) ** 2, 0), 0,
    );
    support.std = Math.max(1e-3, Math.sqrt(squares / (count - 1)));
    support.images = this.standard(support, support.raw);
    const members = new Float32Array(order.length * ways);
    support.labels.forEach((label, i) => (members[i * ways + label] = 1));
    const found = await this.seeGraph.run({
      images: support.images,
      members: this.tensor(members, [order.length, ways]),
    });
    support.classes = found.classes;
    support.shares = await this.shares(support, Array.from(found.shares.data));
    return support;
  }

  /** Shares of the base networks: the gate's, after what labels say. */
  async shares(support, gate) {
    const nothing = new Float32Array((this.sizes.neurons + support.ways) * this.sizes.numbers);
    const told = [];
    for (const alone of [[1, 0], [0, 1]]) {
      const written = await this.written(nothing, alone, support);
      told.push(this.leftOut(written, support));
    }
    return heads.weigh(gate, told, support.labels);
  }

  /** Latents at t = 0, 1 / STEPS, ..., 1 from the noise of a seed. */
  async path(support, seed) {
    const random = normals(seed);
    const { neurons, numbers } = this.sizes;
    const dims = [1, neurons + support.ways, numbers];
    let x = Float32Array.from({ length: dims[1] * numbers }, random.normal);
    const path = [x];
    for (let i = 0; i < STEPS; i++) {
      const { end } = await this.endGraph.run({
        x: this.tensor(x, dims),
        t: this.tensor(Float32Array.of(i / STEPS), [1]),
        classes: support.classes,
      });
      x = x.map((value, j) => value + (end.data[j] - value) / (STEPS - i));
      path.push(x);
    }
    return path;
  }

  /** The network of latents x: its layers, its head, and what it says of images left out. */
  async network(x, support, seed) {
    const written = await this.written(x, support.shares, support);
    const told = this.leftOut(written, support);
    const counts = support.labels.reduce((found, label) => ((found[label] = (found[label] ?? 0) + 1), found), {});
    const random = normals(seed + 1);
    const again = support.labels.flatMap((label, i) =>
      new Array(Math.max(1, Math.ceil(this.sizes.views / counts[label]) - 1)).fill(i),
    );
    const views = again.map((i) => warped(support.raw[i], random));
    const further = await this.compute(written.layers, this.standard(support, views));
    const labels = [...support.labels, ...again.map((i) => support.labels[i])];
    const times = labels.length / support.labels.length;
    const features = [...written.features, ...further];
    const rows = heads.ridge(features, labels, support.ways, times * written.shrink);
    const head = rows.map((row, c) => row.map((v, f) => written.scale * v + written.correction[c][f]));
    return { layers: written.layers, head, told, features: written.features };
  }

  /** What each network sees in images: its features, (Q, F). */
  async features(networks, support, images) {
    const standard = this.standard(support, images);
    const seen = [];
    for (const { layers } of networks) seen.push(await this.compute(layers, standard));
    return seen;
  }

  /** Probabilities (Q, C) of what networks see, by their vote. */
  classify(networks, support, seen) {
    const sure = heads.confidence(networks.map((network) => network.told), support.labels);
    const found = seen[0].map(() => new Float64Array(support.ways));
    networks.forEach(({ head }, n) =>
      heads.logits(seen[n], head).forEach((row, i) => {
        const log = heads.logSoftmax(row.map((z) => sure * z));
        log.forEach((value, c) => (found[i][c] += Math.exp(value) / networks.length));
      }),
    );
    return found;
  }

  /** How far from all classes is what networks see (Q,), mean over networks. */
  distances(networks, support, seen) {
    const found = new Float64Array(seen[0].length);
    networks.forEach(({ features }, n) =>
      heads
        .distances(seen[n], features, support.labels, support.ways)
        .forEach((value, i) => (found[i] += value / networks.length)),
    );
    return found;
  }

  leftOut(written, support) {
    const found = heads.leftOut(written.features, support.labels, support.ways, written.shrink);
    const extra = heads.logits(written.features, written.correction);
    return found.map((row, i) => row.map((value, c) => written.scale * value + extra[i][c]));
  }

  async written(x, shares, support) {
    const { neurons, numbers, features, layers } = this.sizes;
    const found = await this.writeGraph.run({
      x: this.tensor(x, [1, neurons + support.ways, numbers]),
      shares: this.tensor(Float32Array.from(shares), [1, 2]),
      images: support.images,
    });
    return {
      features: rowsOf(found.features.data, features),
      shrink: found.shrink.data[0],
      scale: found.scale.data[0],
      correction: rowsOf(found.correction.data, features + 1),
      layers: Object.fromEntries(layers.map((name) => [name, found[name]])),
    };
  }

  async compute(layers, images) {
    const { features } = await this.computeGraph.run({ images, ...layers });
    return rowsOf(features.data, this.sizes.features);
  }

  /** Images in units of the support set's pixels, (Q, 3, 32, 32). */
  standard(support, images) {
    const flat = new Float32Array(images.length * PIXELS);
    images.forEach((image, i) =>
      flat.set(image.map((value) => (value - support.mean) / support.std), i * PIXELS),
    );
    return this.tensor(flat, [images.length, 3, SIDE, SIDE]);
  }
}
