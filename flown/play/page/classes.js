// The things to tell apart: a name, examples, which one is drawn for. Cards for them on the page.

import { paint } from "./images.js";

export const MOST = 10;

const element = (tag, values, ...inside) => {
  const made = Object.assign(document.createElement(tag), values);
  made.append(...inside);
  return made;
};

export class Classes {
  /** `changed` is called after every change, `dropped` with files and the class that they are for; `reset` begins. */
  constructor(list, changed, dropped) {
    Object.assign(this, { list, changed, dropped, entries: [], chosen: 0 });
  }

  reset() {
    this.entries = [];
    this.more();
    this.more();
    this.choose(0);
  }

  more() {
    if (this.entries.length === MOST) return;
    this.entries.push({ name: `thing ${this.entries.length + 1}`, examples: [] });
    this.choose(this.entries.length - 1);
  }

  choose(place) {
    this.chosen = place;
    this.show();
  }

  /** Adds an example, {image, drawn}, to a class, by default the chosen one. */
  add(example, place = this.chosen) {
    this.entries[place].examples.push(example);
    this.show();
  }

  remove(place) {
    this.entries.splice(place, 1);
    this.choose(Math.min(this.chosen, this.entries.length - 1));
  }

  /** What keeps the examples from being a support set, or null. */
  problem() {
    if (this.entries.length < 2) return "One thing cannot be told apart: add another.";
    const empty = this.entries.find((entry) => !entry.examples.length);
    if (empty) return `“${empty.name}” has no example: draw one, or remove it.`;
    const seen = new Map();
    for (const entry of this.entries)
      for (const { image } of entry.examples) {
        const before = seen.get(image.join());
        if (before && before !== entry)
          return `The same picture is in “${before.name}” and in “${entry.name}”: remove one.`;
        seen.set(image.join(), entry);
      }
    return null;
  }

  get names() {
    return this.entries.map((entry) => entry.name);
  }

  /** Images and labels of all examples. */
  support() {
    const all = this.entries.flatMap((entry, label) => entry.examples.map(({ image }) => ({ image, label })));
    return { images: all.map(({ image }) => image), labels: all.map(({ label }) => label) };
  }

  show() {
    const held = document.activeElement?.dataset?.key;
    this.list.replaceChildren(...this.entries.map((entry, place) => this.card(entry, place)));
    if (held) this.list.querySelector(`[data-key="${held}"]`)?.focus();
    this.changed();
  }

  card(entry, place) {
    const name = element("input", { type: "text", value: entry.name, maxLength: 24 });
    name.setAttribute("aria-label", `Name of thing ${place + 1}`);
    name.onchange = () => {
      entry.name = name.value.trim() || entry.name;
      this.show();
    };
    const choose = element("button", { type: "button", textContent: "✎", title: `Draw for ${entry.name}` });
    choose.setAttribute("aria-label", `Draw for ${entry.name}`);
    choose.setAttribute("aria-pressed", place === this.chosen);
    choose.dataset.key = `choose${place}`;
    choose.onclick = () => this.choose(place);
    const files = element("input", { type: "file", accept: "image/*", multiple: true });
    files.setAttribute("aria-label", `Pictures of ${entry.name}`);
    files.onchange = () => this.dropped([...files.files], place);
    const remove = element("button", { type: "button", textContent: "✕", title: `Remove ${entry.name}` });
    remove.setAttribute("aria-label", `Remove ${entry.name}`);
    remove.onclick = () => this.remove(place);
    const row = element("div", { className: "row" }, choose, name, element("label", { className: "file" }, "+", files), remove);
    const card = element("li", {}, row, this.examples(entry));
    card.classList.toggle("chosen", place === this.chosen);
    card.ondragover = (event) => { event.preventDefault(); card.classList.add("over"); };
    card.ondragleave = () => card.classList.remove("over");
    card.ondrop = (event) => {
      event.preventDefault();
      card.classList.remove("over");
      this.dropped([...event.dataTransfer.files], place);
    };
    return card;
  }

  examples(entry) {
    if (!entry.examples.length) return element("div", { className: "examples" }, "no example yet");
    const shown = entry.examples.map((example, i) => {
      const canvas = element("canvas", { className: example.drawn ? "drawn" : "" });
      paint(canvas, example.image);
      const button = element("button", { type: "button", title: "Remove" }, canvas);
      button.setAttribute("aria-label", `Remove example ${i + 1} of ${entry.name}`);
      button.onclick = () => {
        entry.examples.splice(i, 1);
        this.show();
      };
      return button;
    });
    return element("div", { className: "examples" }, ...shown);
  }
}
