// The maps: which runs, which token, which part of the map; the pointer and the keyboard; what is read out.

const FEWEST = 8; // columns at the closest zoom
const SQUARE = 48; // columns below which rows are zoomed too

/** What a token is part of: the prompt or the reply, and whose message. */
function partOf(text, position) {
  const part = position < text.generated ? "prompt" : "reply";
  const turn = text.turns.findIndex(([start, stop]) => start <= position && position < stop);
  return turn < 0 ? part : `${part}, message ${turn + 1}: ${text.turns[turn][2]}`;
}

class Explorer {
  constructor(root, book) {
    this.root = root;
    this.book = book;
    this.find = (name) => root.querySelector(`[data-${name}]`);
    const [first, second] = [this.find("left").value, this.find("right").value];
    this.state = { left: first, right: second, show: "mean", prompt: 0, position: 0, kind: "signed", symlog: false, same: false,
      view: "both" };
    this.zoom = { x: 0, y: 0, width: book.width, height: book.height };
    this.cursor = null;
    this.panels = ["left", "right"].map((side) => {
      const figure = root.querySelector(`figure[data-panel="${side}"]`);
      const canvas = figure.querySelector("canvas");
      return { side, figure, canvas, map: new HeatMap(canvas), strip: root.querySelector(`[data-strip="${side}"]`),
        space: new Float32Array(book.cells) };
    });
    this.extents = new WeakMap();
    this.listen();
    new ResizeObserver(() => this.redraw()).observe(this.panels[0].canvas);
  }

  listen() {
    for (const control of this.root.querySelectorAll("[data-control]")) {
      control.addEventListener("change", () => this.take());
    }
    this.slider = this.find("slider");
    this.slider.addEventListener("input", () => this.choose(Number(this.slider.value)));
    this.find("play").addEventListener("click", () => this.play());
    this.find("zoom-in").addEventListener("click", () => this.zoomBy(0.5));
    this.find("zoom-out").addEventListener("click", () => this.zoomBy(2));
    this.find("zoom-all").addEventListener("click", () => this.zoomAll());
    this.find("go").addEventListener("submit", (event) => {
      event.preventDefault();
      this.showIndex(Number(event.target.elements.index.value));
    });
    this.find("fold").addEventListener("toggle", () => this.table());
    for (const panel of this.panels) this.pointers(panel);
  }

  /** Read the controls, load what they ask for, draw. */
  async take(position = null) {
    const value = (name) => this.find(name).value;
    const was = this.state;
    this.state = { ...was, left: value("left"), right: value("right"), show: value("show"), prompt: Number(value("prompt")),
      view: value("view"), symlog: this.find("symlog").checked, same: this.find("same").checked,
      kind: this.root.querySelector("[name$=kind]:checked").value };
    if (!this.state.right) this.state.view = "both";
    await this.load();
    this.frame();
    this.strips();
    this.goTo(position ?? (was.prompt === this.state.prompt && this.begun ? this.state.position : this.startOf()));
    this.begun = true;
  }

  /** Begin at the last token of the prompt: from here on the model answers. */
  startOf() {
    const text = this.book.text(this.state.left, this.state.prompt);
    return text ? Math.max(0, text.generated - 1) : 0;
  }

  async load() {
    for (const name of [this.state.left, this.state.right].filter(Boolean)) {
      await this.book.means(name);
      if (this.state.show === "token") await this.book.tokens(name);
    }
  }

  /** Show and hide what the state has and lacks. */
  frame() {
    const { show, view, right } = this.state;
    this.panels[1].figure.hidden = !right || view === "difference";
    this.find("player").hidden = !this.book.texts.size;
    this.root.classList.toggle("means", show === "mean");
  }

  /** The map of one side: {values, extent, digits}, values null where there is none. */
  side(panel) {
    const { show, kind, prompt, position } = this.state;
    const name = this.state[panel.side];
    const digits = this.digits(name);
    if (show === "mean") {
      const values = this.book.ready.get(`means ${name}`)[kind];
      return { values, digits, extent: this.extent(values) };
    }
    const text = this.book.text(name, prompt);
    const values = this.book.token(name, prompt, position, panel.space);
    return { values, digits, extent: { limit: (text && text.limit) || 1, top: (text && text.top) || 1 } };
  }

  /** How many digits of a run's values can be read. */
  digits(name) {
    const { maps, tokens } = this.book.runs.get(name);
    const how = (this.state.show === "token" && tokens) || maps[0];
    return how.bits === 8 ? 2 : 4;
  }

  extent(values) {
    if (!this.extents.has(values)) this.extents.set(values, extent(values));
    return this.extents.get(values);
  }

  pictures() {
    const { show, kind, view, right, same } = this.state;
    const sides = this.panels.slice(0, right ? 2 : 1).map((panel) => this.side(panel));
    if (view === "difference" && right) {
      const [a, b] = sides;
      const values = a.values && b.values ? this.difference(a.values, b.values, kind) : null;
      const limits = show === "mean" && values ? extent(values) : { limit: Math.max(a.extent.limit, b.extent.limit),
        top: Math.max(a.extent.top, b.extent.top) };
      return [{ values, digits: Math.min(a.digits, b.digits), extent: limits, signed: true }];
    }
    const whole = { limit: Math.max(...sides.map((s) => s.extent.limit)), top: Math.max(...sides.map((s) => s.extent.top)) };
    return sides.map((side) => ({ ...side, extent: same ? whole : side.extent, signed: kind === "signed" }));
  }

  difference(a, b, kind) {
    this.apart = this.apart || new Float32Array(this.book.cells);
    const size = kind === "signed" ? (x) => x : Math.abs;
    for (let i = 0; i < a.length; i++) this.apart[i] = size(a[i]) - size(b[i]);
    return this.apart;
  }

  /** Draw everything that shows. */
  redraw() {
    const names = [this.state.left, this.state.right].filter(Boolean);
    if (!names.every((name) => this.book.ready.has(`means ${name}`))) return; // what loads is drawn when it is there
    const { book } = this;
    const pictures = this.pictures();
    pictures.forEach((picture, i) => {
      const panel = this.panels[i];
      const marks = this.book.runs.get(this.state[panel.side]).marks.map((index) => book.column(index));
      panel.picture = { ...picture, width: book.width, height: book.height, layers: book.layers, symlog: this.state.symlog,
        label: (column) => book.label(column), marks, cursor: this.cursor, message: this.why(panel) };
      panel.map.draw(panel.picture, this.zoom);
      this.legend(panel);
    });
    if (this.find("fold").open) this.table();
  }

  why(panel) {
    const text = this.book.text(this.state[panel.side], this.state.prompt);
    if (text && this.state.position >= text.words.length) return "This reply has ended.";
    return "This page has no map of this token; the strip below shows how much it got.";
  }

  title(panel) {
    const { left, right, view, show } = this.state;
    const what = view === "difference" && right ? `${left} − ${right}` : this.state[panel.side];
    return show === "mean" ? what : `${what}, token ${this.state.position + 1}`;
  }

  legend(panel) {
    const { figure, picture, canvas } = panel;
    const { full } = scaleOf(picture.extent, picture.symlog);
    figure.querySelector("[data-title]").textContent = this.title(panel);
    const size = picture.signed ? [`−${short(full)}`, "0", `+${short(full)}`] : ["0", picture.symlog ? "" : short(full / 2), short(full)];
    figure.querySelector("[data-ramp]").style.background = palette(picture.signed).css;
    figure.querySelectorAll("[data-ends] span").forEach((span, i) => (span.textContent = size[i]));
    const leads = this.book.runs.get(this.state[panel.side]).marks.join(", ");
    canvas.setAttribute("aria-label",
      `Heat map, ${this.title(panel)}: ${this.book.height} layers by ${this.book.width} indices. Leading indices: ${leads}. ` +
      `Colours end at ${short(full)}. Arrow keys move a cursor whose cell is read out; plus and minus zoom.`);
  }

  /** Another token; drawn before this returns. */
  goTo(position) {
    const { left, right, prompt } = this.state;
    const lengths = [left, right].filter(Boolean).map((name) => this.book.text(name, prompt)).filter(Boolean)
      .map((text) => text.words.length);
    const last = Math.max(1, ...lengths) - 1;
    this.state.position = Math.max(0, Math.min(last, position));
    Object.assign(this.slider, { max: last, value: this.state.position });
    this.redraw();
    this.tokenRead();
  }

  tokenRead() {
    const { left, prompt, position } = this.state;
    const text = this.book.text(left, prompt);
    const word = text && text.words[position];
    const part = !text || word === undefined ? "" : partOf(text, position);
    const read = word === undefined ? `token ${position + 1}: the reply has ended` :
      `token ${position + 1} of ${text.words.length} (${part}): “${visible(word)}”, energy ${short(text.energy[position])}`;
    this.find("token").textContent = read;
    this.slider.setAttribute("aria-valuetext", read);
    for (const { strip } of this.panels) {
      const old = strip.querySelector("[aria-selected=true]");
      if (old) old.setAttribute("aria-selected", "false");
      const now = strip.children[position];
      if (now) now.setAttribute("aria-selected", "true");
      const list = strip;
      if (now) list.setAttribute("aria-activedescendant", now.id);
    }
  }

  play() {
    const button = this.find("play");
    if (this.timer) {
      clearInterval(this.timer);
      this.timer = null;
    } else {
      if (this.state.position >= Number(this.slider.max)) this.state.position = -1;
      this.timer = setInterval(() => {
        if (this.state.position >= Number(this.slider.max)) this.play();
        else this.choose(this.state.position + 1);
      }, 140);
    }
    button.textContent = this.timer ? "❚❚ Pause" : "▶ Play";
    button.setAttribute("aria-pressed", String(Boolean(this.timer)));
  }

  /** The texts, each token coloured by its energy over the text's largest. */
  strips() {
    const { prompt, right } = this.state;
    this.panels.forEach((panel, i) => {
      const name = this.state[panel.side];
      const text = name && this.book.text(name, prompt);
      panel.strip.closest("[data-strip-box]").hidden = !text || (i === 1 && !right);
      if (!text) return panel.strip.replaceChildren();
      panel.strip.closest("[data-strip-box]").querySelector("[data-strip-name]").textContent = name;
      panel.strip.setAttribute("aria-label", `Tokens of ${name}, coloured by energy`);
      const most = Math.max(...text.energy) || 1;
      const begins = new Map(text.turns.map(([start, , role]) => [start, role]));
      panel.strip.replaceChildren(...text.words.map((word, at) => {
        const span = document.createElement("span");
        span.id = `${panel.strip.id}-${at}`;
        span.setAttribute("role", "option");
        span.setAttribute("aria-selected", "false");
        span.textContent = visible(word);
        span.style.setProperty("--e", (100 * Math.sqrt(text.energy[at] / most)).toFixed(0) + "%");
        span.title = `token ${at + 1}, energy ${short(text.energy[at])}`;
        if (at === text.generated) span.className = "first";
        if (at < text.generated) span.classList.add("asked");
        if (begins.has(at)) span.dataset.role = begins.get(at);
        span.addEventListener("click", () => this.choose(at));
        return span;
      }));
    });
  }

  /** Go to a token; where there are maps of tokens, show its. Drawn before this returns, but for the first one. */
  choose(position) {
    const show = this.find("show");
    if (show.value === "token" || show.disabled) return this.goTo(position);
    show.value = "token";
    return this.take(position);
  }

  // --- the part of the map that shows

  zoomAll() {
    this.zoom = { x: 0, y: 0, width: this.book.width, height: this.book.height };
    this.redraw();
  }

  zoomBy(factor, across = null, down = null) {
    const { width, height } = this.book;
    const old = this.zoom;
    if (across === null && this.cursor) {
      across = (this.cursor.column + 0.5 - old.x) / old.width;
      down = (this.cursor.row + 0.5 - old.y) / old.height;
      if (across < 0 || across > 1 || down < 0 || down > 1) [across, down] = [0.5, 0.5];
    }
    const [a, d] = [across ?? 0.5, down ?? 0.5];
    const wide = Math.max(Math.min(FEWEST, width), Math.min(width, old.width * factor));
    const tall = Math.max(Math.min(FEWEST, height), height * Math.min(1, wide / Math.min(SQUARE, width)));
    this.zoom = this.inside({ x: old.x + a * (old.width - wide), y: old.y + d * (old.height - tall), width: wide, height: tall });
    this.redraw();
  }

  /** The same part within the map; only whole rows show. */
  inside(zoom) {
    const { width, height } = this.book;
    const tall = Math.min(height, Math.round(zoom.height));
    return { width: zoom.width, height: tall, x: Math.max(0, Math.min(width - zoom.width, zoom.x)),
      y: Math.max(0, Math.min(height - tall, Math.round(zoom.y))) };
  }

  showIndex(label) {
    const column = this.book.column(label);
    if (!(column >= 0 && column < this.book.width)) return this.say(`There is no index ${label}.`);
    const wide = Math.min(this.book.width, SQUARE);
    this.zoom = this.inside({ x: column + 0.5 - wide / 2, y: 0, width: wide, height: this.book.height });
    this.cursor = { row: this.cursor ? this.cursor.row : 0, column };
    this.redraw();
    this.readCursor();
  }

  pointers(panel) {
    const { canvas, map } = panel;
    let dragged = null;
    canvas.addEventListener("pointerdown", (event) => {
      const at = map.at(event);
      if (at) dragged = { from: event, zoom: this.zoom, at, moved: false };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      const at = map.at(event);
      if (dragged) this.pan(panel, event, dragged);
      else if (at) this.read(panel, at);
    });
    canvas.addEventListener("pointerup", () => {
      if (dragged && !dragged.moved) {
        this.cursor = { row: dragged.at.row, column: dragged.at.column };
        this.redraw();
        this.readCursor(panel);
      }
      dragged = null;
    });
    canvas.addEventListener("pointercancel", () => (dragged = null));
    canvas.addEventListener("wheel", (event) => {
      if (document.activeElement !== canvas && !event.ctrlKey && !event.metaKey) return; // else the page could not be scrolled
      const at = map.at(event);
      if (!at) return;
      event.preventDefault();
      this.zoomBy(Math.exp(Math.max(-0.5, Math.min(0.5, event.deltaY / 300))), at.across, at.down);
      this.read(panel, map.at(event) || at);
    }, { passive: false });
    canvas.addEventListener("dblclick", (event) => {
      const at = map.at(event);
      if (at) this.zoomBy(0.25, at.across, at.down);
    });
    canvas.addEventListener("keydown", (event) => this.key(event, panel));
  }

  pan(panel, event, dragged) {
    const { map } = panel;
    const dx = ((event.clientX - dragged.from.clientX) * map.ratio) / map.plot.width;
    const dy = ((event.clientY - dragged.from.clientY) * map.ratio) / map.plot.height;
    if (Math.abs(event.clientX - dragged.from.clientX) + Math.abs(event.clientY - dragged.from.clientY) > 4) dragged.moved = true;
    if (!dragged.moved) return;
    const { zoom } = dragged;
    this.zoom = this.inside({ ...zoom, x: zoom.x - dx * zoom.width, y: zoom.y - dy * zoom.height });
    cancelAnimationFrame(this.frameAsked);
    this.frameAsked = requestAnimationFrame(() => this.redraw());
  }

  key(event, panel) {
    const many = event.shiftKey ? 10 : 1;
    const moves = { ArrowLeft: [-many, 0], ArrowRight: [many, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in moves) this.move(panel, ...moves[event.key]);
    else if (event.key === "+" || event.key === "=") this.zoomBy(0.5);
    else if (event.key === "-") this.zoomBy(2);
    else if (event.key === "0" || event.key === "Home") this.zoomAll();
    else if (event.key === "PageDown") this.goTo(this.state.position + 1);
    else if (event.key === "PageUp") this.goTo(this.state.position - 1);
    else if (event.key === "Enter" && this.cursor) this.open();
    else return;
    event.preventDefault();
  }

  move(panel, columns, rows) {
    const { width, height } = this.book;
    const { zoom } = this;
    const start = { column: Math.floor(zoom.x + zoom.width / 2), row: Math.floor(zoom.y + zoom.height / 2) };
    const now = this.cursor || start;
    const clamp = (x, most) => Math.max(0, Math.min(most - 1, x));
    this.cursor = { column: clamp(now.column + columns, width), row: clamp(now.row + rows, height) };
    const { column, row } = this.cursor;
    const x = column < zoom.x ? column : column + 1 > zoom.x + zoom.width ? column + 1 - zoom.width : zoom.x;
    const y = row < zoom.y ? row : row + 1 > zoom.y + zoom.height ? row + 1 - zoom.height : zoom.y;
    this.zoom = this.inside({ ...zoom, x, y });
    this.redraw();
    this.readCursor(panel);
  }

  open() {
    const page = document.getElementById(`${this.root.dataset.prefix}index-${this.book.label(this.cursor.column)}`);
    if (page) location.hash = page.id;
    else this.say(`Index ${this.book.label(this.cursor.column)} has no page of its own.`);
  }

  // --- what is read out

  describe(at) {
    const { layers, width } = this.book;
    const shown = this.panels.filter((panel) => !panel.figure.hidden && panel.picture && panel.picture.values);
    const values = shown.map((panel) => `${this.title(panel)}: ${short(panel.picture.values[at.row * width + at.column], panel.picture.digits)}`);
    return `layer ${layers[at.row]}, index ${this.book.label(at.column)} — ${values.join("; ") || "no map"}`;
  }

  read(panel, at) {
    this.find("readout").textContent = this.describe(at);
  }

  readCursor() {
    if (this.cursor) this.say(this.describe(this.cursor));
  }

  say(text) {
    this.find("readout").textContent = text;
    this.find("live").textContent = text;
  }

  /** The strongest cells of what shows, as a table. */
  table() {
    const panels = this.panels.filter((panel) => !panel.figure.hidden && panel.picture && panel.picture.values);
    if (!this.find("fold").open || !panels.length) return;
    const { x, y, width, height } = this.zoom;
    const values = panels[0].picture.values;
    const cells = [];
    for (let row = Math.floor(y); row < Math.min(this.book.height, y + height); row++) {
      for (let column = Math.floor(x); column < Math.min(this.book.width, x + width); column++) {
        const value = values[row * this.book.width + column];
        if (value === value) cells.push([Math.abs(value), row, column]);
      }
    }
    cells.sort((a, b) => b[0] - a[0]);
    const head = ["layer", "index", ...panels.map((panel) => this.title(panel))];
    const rows = cells.slice(0, 30).map(([, row, column]) => [this.book.layers[row], this.book.label(column),
      ...panels.map((panel) => short(panel.picture.values[row * this.book.width + column], panel.picture.digits))]);
    this.find("table").replaceChildren(tableOf(head, rows, `The ${rows.length} largest values of what shows`));
  }
}

function visible(word) {
  return word.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}

function tableOf(head, rows, caption) {
  const table = document.createElement("table");
  table.createCaption().textContent = caption;
  const cell = (name, text) => Object.assign(document.createElement(name), { textContent: text, className: "number" });
  table.createTHead().insertRow().append(...head.map((text) => Object.assign(cell("th", text), { scope: "col" })));
  const body = table.createTBody();
  for (const row of rows) body.insertRow().append(...row.map((text) => cell("td", text)));
  return table;
}
