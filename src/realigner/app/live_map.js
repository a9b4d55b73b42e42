// The report's explorer on maps that come while a reply is made. The app gives pictures (`take`) and answers (`ask`).

/** What `Book` is for a report, for the newest reply: its mean maps at once, a token's map when it is asked for. */
class LiveBook {
  constructor({ layers, neurons }) {
    Object.assign(this, { layers, neurons: null, width: neurons, height: layers.length, cells: layers.length * neurons });
    this.clear();
  }

  clear() {
    Object.assign(this, { id: null, runs: new Map(), texts: new Map(), ready: new Map(), maps: new Map() });
  }

  /** Take a picture of `LiveMap.picture`; true when it is of another reply than the last one. */
  async take({ id, words, generated, runs }) {
    const fresh = id !== this.id;
    const means = await Promise.all(runs.map((run) => Promise.all(run.maps.map((map) => this.values(map)))));
    if (fresh) this.clear();
    this.id = id;
    runs.forEach((run, number) => {
      const [signed, absolute] = means[number];
      this.runs.set(run.name, { ...run, number });
      this.ready.set(`means ${run.name}`, { signed, absolute });
      this.texts.set(run.name, { run: run.name, words, generated, turns: [], energy: run.energy, limit: run.limit, top: run.top });
    });
    return fresh;
  }

  async values(map) {
    return decoded(codesOf(await unpacked(map.data), map.bits), map);
  }

  text(run) {
    return this.texts.get(run);
  }

  label(column) {
    return column;
  }

  column(label) {
    return label;
  }

  means() {
    return Promise.resolve();
  }

  tokens() {
    return Promise.resolve();
  }

  /** A token's map, if it is here; else it is asked for, and `arrived` called when it is. */
  token(run, _prompt, position, into) {
    const key = `${run} ${position}`;
    const map = this.maps.get(key);
    if (map instanceof Float32Array) {
      into.set(map);
      return into;
    }
    const text = this.texts.get(run);
    if (!map && text && position < text.words.length) {
      const { id } = this;
      this.maps.set(key, true);
      window.ask("token", { id, run, position }).then((found) => this.values(found)).then((values) => {
        if (id !== this.id) return;
        this.maps.set(key, values);
        this.arrived();
      }).catch(() => this.maps.delete(key));
    }
    return null;
  }
}

class LiveExplorer extends Explorer {
  /** A new picture of the same reply, or of another. */
  async show(picture) {
    const fresh = await this.book.take(picture);
    this.root.classList.toggle("one", this.book.runs.size < 2);
    if (fresh) this.offer();
    if (!this.begun || fresh) return this.take(0);
    this.strips();
    const [last, { position }] = [picture.words.length - 1, this.state];
    this.goTo(this.followed && this.state.show === "mean" ? last : Math.min(position, last));
  }

  /** The runs of this reply, in the two lists. */
  offer() {
    const names = [...this.book.runs.keys()];
    const options = (list) => list.map((name) => Object.assign(document.createElement("option"), { textContent: name, value: name }));
    const [left, right] = [this.find("left"), this.find("right")];
    const kept = names.includes(left.value) ? left.value : names[0];
    left.replaceChildren(...options(names));
    left.value = kept;
    right.replaceChildren(Object.assign(document.createElement("option"), { textContent: "none", value: "" }), ...options(names));
    this.find("show").value = "mean";
    this.followed = true;
    document.querySelector("[data-panel-of-index]").replaceChildren();
  }

  redraw() {
    if (this.book.ready.has(`means ${this.state.left}`)) super.redraw(); // else there is nothing yet
  }

  strips() {
    super.strips();
    if (this.followed) for (const { strip } of this.panels) strip.scrollTop = strip.scrollHeight;
  }

  choose(position) {
    this.followed = false;
    return super.choose(position);
  }

  why(panel) {
    return super.why(panel) === "This reply has ended." ? "This reply has ended." : "Fetching the map of this token ...";
  }

  readCursor(panel) {
    super.readCursor(panel);
    this.profile();
  }

  open() {
    this.profile();
  }

  /** What is known of the index under the cursor, below the map. */
  async profile() {
    if (!this.cursor) return;
    const { id } = this.book;
    const { left: run, show, position } = this.state;
    const index = this.cursor.column;
    const html = await window.ask("index", { id, run, index, position: show === "token" ? position : null });
    if (id === this.book.id && this.cursor && this.cursor.column === index) {
      document.querySelector("[data-panel-of-index]").innerHTML = html;
    }
  }
}

const root = document.querySelector("[data-explorer]");
const book = new LiveBook(JSON.parse(document.querySelector("[data-shape]").textContent));
const explorer = new LiveExplorer(root, book);
book.arrived = () => explorer.redraw();
document.querySelector("[data-filled]").append(document.getElementById("keys")); // below what is said of an index
root.explorer = explorer; // for whoever looks from outside
let waiting = Promise.resolve();

/** A picture, or a message that says why there is none. */
window.take = (picture) => {
  waiting = waiting.then(async () => {
    document.documentElement.dataset.done = "false";
    const there = Boolean(picture && picture.runs && picture.runs.length);
    if (picture && !there && picture.message) {
      document.querySelector("[data-waiting]").textContent = picture.message;
      book.clear();
    }
    document.querySelector("[data-filled]").hidden = !there;
    document.querySelector("[data-waiting]").hidden = there;
    if (there) await explorer.show(picture);
    document.documentElement.dataset.done = String(Boolean(picture && picture.done));
  });
  return waiting;
};

window.dress = (dark) => {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  if (book.id) explorer.redraw();
};
