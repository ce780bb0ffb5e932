// A pad for drawing by mouse, finger, pen or keyboard. Strokes are lists of {x, y} in [0, 1].

const SIZE = 320;
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Pad {
  /** `changed` is called after each stroke, `entered` when Enter is pressed. */
  constructor(place, label, changed, entered) {
    this.canvas = document.createElement("canvas");
    this.canvas.width = this.canvas.height = SIZE;
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-label", label);
    place.append(this.canvas);
    Object.assign(this, { strokes: [], down: false, pen: { x: 0.5, y: 0.5 }, keys: false, changed, entered });
    const on = (name, action) => this.canvas.addEventListener(name, (event) => action.call(this, event));
    on("pointerdown", this.begin);
    on("pointermove", this.move);
    on("pointerup", this.end);
    on("pointercancel", this.end);
    on("keydown", this.key);
    on("blur", () => { this.lift(); this.keys = false; this.paint(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.paint());
    this.paint();
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  }

  begin(event) {
    if (event.button) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.keys = false;
    this.lower(this.at(event));
  }

  move(event) {
    if (!this.down || this.keys) return;
    for (const part of event.getCoalescedEvents?.() ?? []) this.strokes.at(-1).push(this.at(part));
    this.strokes.at(-1).push(this.at(event));
    this.paint();
  }

  end() {
    if (!this.keys) this.lift();
  }

  lower(point) {
    this.down = true;
    this.strokes.push([point]);
    this.paint();
  }

  lift() {
    if (!this.down) return;
    this.down = false;
    this.changed();
  }

  key(event) {
    const by = KEYS[event.key];
    if (by) {
      this.keys = true;
      const to = (at, axis) => Math.min(0.97, Math.max(0.03, at + 0.04 * by[axis]));
      this.pen = { x: to(this.pen.x, 0), y: to(this.pen.y, 1) };
      if (this.down) this.strokes.at(-1).push({ ...this.pen });
    } else if (event.key === " ") {
      this.keys = true;
      if (this.down) this.lift();
      else this.lower({ ...this.pen });
    } else if (event.key === "Enter") {
      this.lift();
      this.entered();
    } else if (event.key === "Escape") this.clear();
    else return;
    event.preventDefault();
    this.paint();
  }

  clear() {
    this.strokes = [];
    this.down = false;
    this.paint();
    this.changed();
  }

  paint() {
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, SIZE, SIZE);
    context.strokeStyle = getComputedStyle(this.canvas).color;
    Object.assign(context, { lineWidth: 12, lineCap: "round", lineJoin: "round" });
    for (const stroke of this.strokes) {
      context.beginPath();
      context.moveTo(stroke[0].x * SIZE, stroke[0].y * SIZE);
      for (const point of stroke) context.lineTo(point.x * SIZE, point.y * SIZE);
      context.stroke();
    }
    if (!this.keys) return;
    Object.assign(context, { lineWidth: 3 });
    context.beginPath();
    context.arc(this.pen.x * SIZE, this.pen.y * SIZE, this.down ? 5 : 10, 0, 7);
    context.stroke();
  }
}
