// The head that a support set determines, and how sure it may be: flown/anytask/ridge.py and evidence.py.
// Matrices are arrays of rows, Float64Array each; `labels` are class numbers, one an image.

/** X of A X = B, for symmetric positive definite A, by Cholesky decomposition. */
export function solve(a, b) {
  const n = a.length;
  const l = a.map((row) => Float64Array.from(row));
  for (let j = 0; j < n; j++) {
    for (let k = 0; k < j; k++) l[j][j] -= l[j][k] ** 2;
    if (!(l[j][j] > 0)) throw new Error("the images of the classes cannot be told apart");
    l[j][j] = Math.sqrt(l[j][j]);
    for (let i = j + 1; i < n; i++) {
      let sum = l[i][j];
      for (let k = 0; k < j; k++) sum -= l[i][k] * l[j][k];
      l[i][j] = sum / l[j][j];
    }
  }
  const x = b.map((row) => Float64Array.from(row));
  const each = (i, k) => x[i].forEach((_, c) => (x[i][c] -= (k > i ? l[k][i] : l[i][k]) * x[k][c]));
  for (let i = 0; i < n; i++) {
    for (let k = 0; k < i; k++) each(i, k);
    x[i].forEach((_, c) => (x[i][c] /= l[i][i]));
  }
  for (let i = n - 1; i >= 0; i--) {
    for (let k = i + 1; k < n; k++) each(i, k);
    x[i].forEach((_, c) => (x[i][c] /= l[i][i]));
  }
  return x;
}

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
const oneHot = (labels, ways) =>
  labels.map((label) => Float64Array.from({ length: ways }, (_, c) => (c === label) - 1 / ways));

/** Features (K, F) as A = [features, 1], its A A', and A A' with the penalty on its diagonal. */
function grams(features, shrink) {
  const a = features.map((row) => Float64Array.from([...row, 1]));
  const gram = a.map((x) => Float64Array.from(a, (y) => dot(x, y)));
  const penalty = (shrink * gram.reduce((sum, row, i) => sum + row[i], 0)) / a.length;
  const shrunk = gram.map((row, i) => row.map((value, j) => value + (i === j ? penalty : 0)));
  return { a, gram, shrunk };
}

/** Rows of a last layer, weights and bias, (C, F + 1): the ridge regression of classes on features. */
export function ridge(features, labels, ways, shrink) {
  const { a, shrunk } = grams(features, shrink);
  const dual = solve(shrunk, oneHot(labels, ways));
  return Array.from({ length: ways }, (_, c) => {
    const row = new Float64Array(a[0].length);
    a.forEach((x, i) => x.forEach((value, f) => (row[f] += dual[i][c] * value)));
    return row;
  });
}

/** Logits (Q, C) of features (Q, F) behind rows (C, F + 1). */
export function logits(features, rows) {
  return features.map((x) =>
    Float64Array.from(rows, (row) => x.reduce((sum, value, f) => sum + value * row[f], row[x.length])),
  );
}

/** In which round an image is left out: 1 for the first of its class, 0 for a class's only one. */
export function turns(labels) {
  const seen = {};
  const place = labels.map((label) => (seen[label] = (seen[label] ?? 0) + 1));
  return place.map((turn, i) => (seen[labels[i]] > 1 ? turn : 0));
}

/** What regressions without them say of images, (K, C): rounds as in `turns`. */
export function leftOut(features, labels, ways, shrink) {
  const { gram, shrunk } = grams(features, shrink);
  const wanted = oneHot(labels, ways);
  const hat = solve(shrunk, gram);
  const fitted = hat.map((row) =>
    Float64Array.from({ length: ways }, (_, c) => row.reduce((sum, h, i) => sum + h * wanted[i][c], 0)),
  );
  const found = fitted.map((row) => row.slice());
  const turn = turns(labels);
  for (let place = 1; place <= Math.max(...turn); place++) {
    const rows = turn.flatMap((value, i) => (value === place ? [i] : []));
    const kept = rows.map((i) => Float64Array.from(rows, (j) => (i === j) - hat[i][j]));
    const errors = solve(kept, rows.map((i) => wanted[i].map((value, c) => value - fitted[i][c])));
    rows.forEach((i, place) => (found[i] = wanted[i].map((value, c) => value - errors[place][c])));
  }
  return found;
}

export function logSoftmax(row) {
  const most = Math.max(...row);
  const sum = Math.log(row.reduce((total, value) => total + Math.exp(value - most), 0)) + most;
  return row.map((value) => value - sum);
}

/** By what heads are multiplied so that their mean is as sure as it is right; `told` (n, K, C). */
export function confidence(told, labels) {
  const telling = turns(labels).flatMap((turn, i) => (turn ? [i] : []));
  let best = { loss: Infinity, factor: 1 };
  for (let step = 0; step <= 18; step++) {
    const doublings = -3 + step / 3;
    let loss = doublings ** 2 / 2;
    for (const i of telling) {
      const p = told.map((t) => Math.exp(logSoftmax(t[i].map((z) => 2 ** doublings * z))[labels[i]]));
      loss -= Math.log(Math.max(Number.MIN_VALUE, p.reduce((sum, value) => sum + value, 0) / p.length));
    }
    if (loss < best.loss) best = { loss, factor: 2 ** doublings };
  }
  return best.factor;
}

/** Shares of two base networks after what each, alone, says of images that it has not seen. */
export function weigh(shares, told, labels) {
  const telling = turns(labels).flatMap((turn, i) => (turn ? [i] : []));
  if (!telling.length) return shares;
  const likely = told.map((t) => {
    const sure = confidence([t], labels);
    return telling.map((i) => logSoftmax(t[i].map((z) => sure * z))[labels[i]]);
  });
  const ahead = telling.map((_, i) => likely[0][i] - likely[1][i]);
  const n = ahead.length;
  const mean = ahead.reduce((sum, value) => sum + value, 0) / n;
  const spread = ahead.reduce((sum, value) => sum + (value - mean) ** 2, 1) / n;
  const logit = Math.log(shares[0]) - Math.log(shares[1]) + (1.702 * mean) / Math.sqrt(spread / n);
  const first = 1 / (1 + Math.exp(-logit));
  return [first, 1 - first];
}

/** Distances (Q,) of features (Q, F) from the nearest class's mean: flown/heads/unknown.py. */
export function distances(features, support, labels, ways) {
  const centres = Array.from({ length: ways }, () => new Float64Array(support[0].length));
  const counts = new Array(ways).fill(0);
  labels.forEach((label) => counts[label]++);
  labels.forEach((label, i) => support[i].forEach((v, f) => (centres[label][f] += v / counts[label])));
  return features.map((x) => Math.min(...centres.map((c) => Math.hypot(...x.map((v, f) => v - c[f])))));
}

/** The distance that an image of the classes exceeds with a probability of about `rate` at most. */
export function limit(known, rate) {
  const sorted = [...known].sort((a, b) => a - b);
  return sorted[Math.min(Math.ceil((sorted.length + 1) * (1 - rate)), sorted.length) - 1];
}
