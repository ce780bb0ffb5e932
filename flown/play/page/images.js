// Images as the generator reads them: 32 x 32, three channels, floats in [0, 1], planes one after the other.

export const SIDE = 32;
const PLANE = SIDE * SIDE;
const MOST = 40e6; // pixels of a picture
const FINE = 4; // strokes are drawn that many times as fine

const surface = (side) => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  return canvas.getContext("2d", { willReadFrequently: true });
};

function planes(context) {
  const pixels = context.getImageData(0, 0, SIDE, SIDE).data;
  const found = new Float32Array(3 * PLANE);
  for (let i = 0; i < PLANE; i++)
    for (let c = 0; c < 3; c++) found[c * PLANE + i] = pixels[4 * i + c] / 255;
  return found;
}

/** Strokes, lists of {x, y}, as a bright drawing on black that fills most of the image. */
export function drawn(strokes) {
  const points = strokes.flat();
  const [left, right] = [Math.min(...points.map((p) => p.x)), Math.max(...points.map((p) => p.x))];
  const [top, bottom] = [Math.min(...points.map((p) => p.y)), Math.max(...points.map((p) => p.y))];
  const side = SIDE * FINE;
  const scale = (0.72 * side) / Math.max(right - left, bottom - top, 0.15);
  const at = (p) => [
    side / 2 + (p.x - (left + right) / 2) * scale,
    side / 2 + (p.y - (top + bottom) / 2) * scale,
  ];
  const fine = surface(side);
  fine.fillRect(0, 0, side, side);
  Object.assign(fine, { strokeStyle: "#fff", lineWidth: 2.4 * FINE, lineCap: "round", lineJoin: "round" });
  for (const stroke of strokes) {
    fine.beginPath();
    fine.moveTo(...at(stroke[0]));
    for (const p of stroke) fine.lineTo(...at(p));
    fine.stroke();
  }
  const small = surface(SIDE);
  small.imageSmoothingQuality = "high";
  small.drawImage(fine.canvas, 0, 0, SIDE, SIDE);
  return planes(small);
}

/** A picture's file, its longer side cut to a square. */
export async function read(file) {
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name} is not a picture that this browser can read. Try a PNG or a JPEG.`);
  }
  const { width, height } = picture;
  if (width * height > MOST) {
    picture.close();
    const size = Math.round((width * height) / 1e6);
    throw new Error(`${file.name} has ${size} megapixels. Make it smaller: 40 are the most.`);
  }
  const side = Math.min(width, height);
  const context = surface(SIDE);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, (width - side) / 2, (height - side) / 2, side, side, 0, 0, SIDE, SIDE);
  picture.close();
  return planes(context);
}

/** Paints an image on a canvas of its size. */
export function paint(canvas, image) {
  canvas.width = canvas.height = SIDE;
  const pixels = new ImageData(SIDE, SIDE);
  for (let i = 0; i < PLANE; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = 255 * image[c * PLANE + i];
    pixels.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

/** Slightly turned, moved, stretched and bent: Looks.views of flown/tasks/looks.py. */
export function warped(image, random) {
  const spread = () => 0.12 * random.normal();
  const [angle, wide, high, skew] = [spread(), spread(), spread(), spread()];
  const matrix = [
    [Math.exp(wide) * Math.cos(angle), skew - Math.sin(angle), 0.07 * random.normal()],
    [Math.sin(angle), Math.exp(high) * Math.cos(angle), 0.07 * random.normal()],
  ];
  const strength = 0.1 * random.uniform() ** 2;
  const bends = [0, 1].map(() => Array.from({ length: 16 }, () => strength * random.normal()));
  const found = new Float32Array(image.length);
  for (let row = 0; row < SIDE; row++)
    for (let column = 0; column < SIDE; column++) {
      const [u, v] = [(2 * column + 1) / SIDE - 1, (2 * row + 1) / SIDE - 1];
      const [x, y] = matrix.map(
        ([a, b, c], axis) => a * u + b * v + c + bent(bends[axis], row, column),
      );
      for (let c = 0; c < 3; c++)
        found[c * PLANE + row * SIDE + column] = sample(image, c * PLANE, x, y);
    }
  return found;
}

/** A field of 4 x 4 numbers between its corners. */
function bent(field, row, column) {
  const place = (i) => {
    const at = (3 * i) / (SIDE - 1);
    const low = Math.min(2, Math.floor(at));
    return [low, at - low];
  };
  const [[i, s], [j, t]] = [place(row), place(column)];
  const at = (a, b) => field[4 * a + b];
  const above = at(i, j) * (1 - t) + at(i, j + 1) * t;
  const below = at(i + 1, j) * (1 - t) + at(i + 1, j + 1) * t;
  return above * (1 - s) + below * s;
}

/** A plane of an image at (x, y) in [-1, 1], reflected at its borders. */
function sample(image, plane, x, y) {
  const place = (at) => {
    const pixel = ((at + 1) * SIDE - 1) / 2 + 0.5;
    const folded = ((pixel % (2 * SIDE)) + 2 * SIDE) % (2 * SIDE);
    const inside = Math.min(SIDE - 1, Math.max(0, Math.min(folded, 2 * SIDE - folded) - 0.5));
    const low = Math.min(SIDE - 2, Math.floor(inside));
    return [low, inside - low];
  };
  const [[j, t], [i, s]] = [place(x), place(y)];
  const at = (a, b) => image[plane + a * SIDE + b];
  return (
    (at(i, j) * (1 - t) + at(i, j + 1) * t) * (1 - s) +
    (at(i + 1, j) * (1 - t) + at(i + 1, j + 1) * t) * s
  );
}
