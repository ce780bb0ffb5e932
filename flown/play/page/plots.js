// Matrices, filters and a curve on canvases, in the page's colours.

const colour = (name) => {
  const value = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const hex = value.length === 4 ? [...value.slice(1)].map((d) => d + d).join("") : value.slice(1);
  return [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
};

/** Numbers as pixels: nothing is the ground, negative one colour, positive another. */
export function heat(canvas, rows) {
  const [ground, low, high] = ["--surface", "--accent", "--warm"].map(colour);
  const sizes = rows.flatMap((row) => Array.from(row, Math.abs)).sort((a, b) => a - b);
  const most = sizes[Math.floor(0.98 * (sizes.length - 1))] || 1;
  [canvas.height, canvas.width] = [rows.length, rows[0].length];
  const pixels = new ImageData(canvas.width, canvas.height);
  rows.forEach((row, i) =>
    row.forEach((value, j) => {
      const amount = Math.min(1, Math.abs(value) / most);
      const end = value < 0 ? low : high;
      const at = 4 * (i * canvas.width + j);
      for (let c = 0; c < 3; c++) pixels.data[at + c] = ground[c] + (end[c] - ground[c]) * amount;
      pixels.data[at + 3] = 255;
    }),
  );
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

/** Filters (n, channels, k, k) side by side, summed over channels: what grey images meet. */
export function filters(canvas, weights, [n, channels, k]) {
  const across = 16;
  const gap = k + 1;
  const rows = Array.from({ length: Math.ceil(n / across) * gap - 1 }, () => new Float64Array(across * gap - 1));
  for (let f = 0; f < n; f++)
    for (let c = 0; c < channels; c++)
      for (let i = 0; i < k * k; i++) {
        const row = Math.floor(f / across) * gap + Math.floor(i / k);
        rows[row][(f % across) * gap + (i % k)] += weights[(f * channels + c) * k * k + i];
      }
  heat(canvas, rows);
}

/** Shares in [0, 1] by t, with chance as a broken line and the time that is shown. */
export function curve(canvas, shares, chance, now) {
  const [width, height, edge] = [480, 120, 10];
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  const rgb = (name) => `rgb(${colour(name).join()})`;
  const at = (i, share) => [
    edge + (i / (shares.length - 1)) * (width - 2 * edge),
    height - edge - share * (height - 2 * edge),
  ];
  const line = (points, dashes) => {
    context.setLineDash(dashes);
    context.beginPath();
    points.forEach((p, i) => (i ? context.lineTo(...p) : context.moveTo(...p)));
    context.stroke();
  };
  context.lineWidth = 2;
  context.strokeStyle = rgb("--soft");
  line([at(0, chance), at(shares.length - 1, chance)], [6, 6]);
  context.strokeStyle = rgb("--line");
  line([at(now, 0), at(now, 1)], []);
  context.strokeStyle = context.fillStyle = rgb("--accent");
  line(shares.map((share, i) => at(i, share)), []);
  context.beginPath();
  context.arc(...at(now, shares[now]), 5, 0, 7);
  context.fill();
}
