// A few things drawn by formulas, for those who look before they draw.

import { drawn } from "./images.js";
import { normals } from "./random.js";

const turn = (n, at) => Array.from({ length: n + 1 }, (_, i) => at(i / n));
const ring = (s) => ({ x: Math.cos(2 * Math.PI * s), y: Math.sin(2 * Math.PI * s) });
const path = (...points) => points.map(([x, y]) => ({ x, y }));

const THINGS = {
  circle: () => [turn(40, ring)],
  triangle: () => [path([0, -1], [1, 0.9], [-1, 0.9], [0, -1])],
  zigzag: () => [path([-1, -0.6], [-0.5, 0.6], [0, -0.6], [0.5, 0.6], [1, -0.6])],
  arrow: () => [path([-1, 0], [1, 0]), path([0.4, -0.5], [1, 0], [0.4, 0.5])],
  spiral: () => [turn(60, (s) => ({ x: s * ring(2 * s).x, y: s * ring(2 * s).y }))],
};

/** Names and examples {image, drawn}, `count` of each, none like another. */
export function samples(count) {
  const random = normals(3);
  const near = (spread) => spread * random.normal();
  const entries = Object.entries(THINGS).map(([name, strokes]) => {
    const examples = Array.from({ length: count }, () => {
      const [angle, wide, high] = [near(0.12), Math.exp(near(0.12)), Math.exp(near(0.12))];
      const moved = strokes().map((stroke) =>
        stroke.map(({ x, y }) => ({
          x: wide * x * Math.cos(angle) - high * y * Math.sin(angle) + near(0.02),
          y: wide * x * Math.sin(angle) + high * y * Math.cos(angle) + near(0.02),
        })),
      );
      return { image: drawn(moved), drawn: true };
    });
    return { name, examples };
  });
  return entries;
}
