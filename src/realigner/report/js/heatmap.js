// One map on one canvas. A screen has fewer pixels than a map has columns: a pixel shows the value of largest magnitude
// among its columns, sign and all, so that a stripe one column wide is there at every zoom.

const MARGIN = { left: 46, right: 8, top: 26, bottom: 30 };

class HeatMap {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.aside = document.createElement("canvas");
    this.plot = { x: 0, y: 0, width: 1, height: 1 };
  }

  /** Fit the canvas to its place; true when that changed anything. */
  fit() {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.round(this.canvas.clientWidth * ratio));
    const height = Math.max(1, Math.round(this.canvas.clientHeight * ratio));
    this.ratio = ratio;
    this.plot = {
      x: Math.round(MARGIN.left * ratio),
      y: Math.round(MARGIN.top * ratio),
      width: Math.max(1, width - Math.round((MARGIN.left + MARGIN.right) * ratio)),
      height: Math.max(1, height - Math.round((MARGIN.top + MARGIN.bottom) * ratio)),
    };
    if (this.canvas.width === width && this.canvas.height === height) return false;
    Object.assign(this.canvas, { width, height });
    return true;
  }

  /** First column of each pixel, and one past the last one's. */
  columns({ x, width }, total) {
    const pixels = this.plot.width;
    const starts = new Int32Array(pixels);
    const stops = new Int32Array(pixels);
    const step = width / pixels;
    for (let p = 0; p < pixels; p++) {
      const first = Math.floor(x + (step > 1 ? p : p + 0.5) * step);
      const last = step > 1 ? Math.floor(x + (p + 1) * step) : first + 1;
      starts[p] = Math.max(0, Math.min(total - 1, first));
      stops[p] = Math.max(starts[p] + 1, Math.min(total, last));
    }
    if (step > 1 && x + width >= total) stops[pixels - 1] = total;
    return { starts, stops };
  }

  /**
   * Draw it.
   * picture: {values, width, height, extent, symlog, signed, marks, cursor, layers, label, message}; view: {x, y, width, height}.
   */
  draw(picture, view) {
    this.fit();
    const { context, canvas, plot } = this;
    this.picture = picture;
    this.view = view;
    const style = getComputedStyle(canvas);
    this.ink = style.color;
    this.soft = style.textDecorationColor; // resolved, as a variable with light-dark() in it would not be
    this.font = style.fontFamily;
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (picture.values) this.cells(picture, view);
    else this.message(picture.message || "");
    context.strokeStyle = this.soft;
    context.globalAlpha = 0.4;
    context.strokeRect(plot.x - 0.5, plot.y - 0.5, plot.width + 1, plot.height + 1);
    context.globalAlpha = 1;
    this.axes(picture, view);
    if (picture.values) {
      this.marks(picture, view);
      this.cursor(picture, view);
    }
  }

  cells({ values, width, height, extent, symlog, signed }, view) {
    const { plot, context } = this;
    const { pixels, none } = palette(signed);
    const { starts, stops } = this.columns(view, width);
    const firstRow = Math.max(0, Math.floor(view.y));
    const rows = Math.min(height, Math.ceil(view.y + view.height)) - firstRow;
    const image = new ImageData(plot.width, rows);
    const out = new Int32Array(image.data.buffer);
    const soft = extent.limit / 30;
    const whole = STEPS / Math.log1p(extent.top / soft);
    const linear = STEPS / extent.limit;
    for (let r = 0; r < rows; r++) {
      const row = (firstRow + r) * width;
      const at = r * plot.width;
      for (let p = 0; p < plot.width; p++) {
        let value = values[row + starts[p]];
        let size = value < 0 ? -value : value;
        for (let c = starts[p] + 1; c < stops[p]; c++) {
          const other = values[row + c];
          const larger = other < 0 ? -other : other;
          if (larger > size) {
            size = larger;
            value = other;
          }
        }
        if (value !== value) {
          out[at + p] = none;
        } else {
          let place = symlog ? Math.log1p(size / soft) * whole : size * linear;
          if (place > STEPS) place = STEPS;
          out[at + p] = pixels[STEPS + Math.round(value < 0 ? -place : place)];
        }
      }
    }
    Object.assign(this.aside, { width: plot.width, height: rows });
    this.aside.getContext("2d").putImageData(image, 0, 0);
    context.save();
    context.beginPath();
    context.rect(plot.x, plot.y, plot.width, plot.height);
    context.clip();
    context.imageSmoothingEnabled = false;
    const tall = plot.height / view.height;
    context.drawImage(this.aside, plot.x, plot.y + (firstRow - view.y) * tall, plot.width, rows * tall);
    this.numbers({ values, width, height, extent, symlog }, view);
    context.restore();
  }

  /** Where cells are large enough, their values in them. */
  numbers({ values, width, height, extent, symlog }, view) {
    const { context, plot, ratio } = this;
    const [wide, tall] = [plot.width / view.width, plot.height / view.height];
    if (wide < 46 * ratio || tall < 14 * ratio) return;
    const scale = scaleOf(extent, symlog);
    const dark = isDark();
    context.font = `${10 * ratio}px ${this.font}`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (let r = Math.floor(view.y); r < Math.min(height, view.y + view.height); r++) {
      for (let c = Math.floor(view.x); c < Math.min(width, view.x + view.width); c++) {
        const value = values[r * width + c];
        if (value !== value) continue;
        const strong = Math.abs(scale.of(value)) > 0.55;
        context.fillStyle = strong !== dark ? "#ffffff" : "#1d2430";
        context.fillText(short(value, 2), plot.x + (c + 0.5 - view.x) * wide, plot.y + (r + 0.5 - view.y) * tall);
      }
    }
  }

  axes({ width, height, layers, label }, view) {
    const { context, plot, ratio } = this;
    context.fillStyle = this.soft;
    context.font = `${11 * ratio}px ${this.font}`;
    const [wide, tall] = [plot.width / view.width, plot.height / view.height];
    context.textAlign = "right";
    context.textBaseline = "middle";
    const every = [1, 2, 4, 5, 8, 10, 16, 20, 25, 50].find((step) => step * tall >= 15 * ratio) || 100;
    for (let r = Math.ceil(view.y - 0.4); r < Math.min(height, view.y + view.height); r++) {
      if (r % every) continue;
      context.fillText(layers[r], plot.x - 6 * ratio, plot.y + (r + 0.5 - view.y) * tall);
    }
    context.textAlign = "center";
    context.textBaseline = "top";
    const least = (56 * ratio) / wide;
    const power = 10 ** Math.floor(Math.log10(least));
    const step = Math.max(1, [1, 2, 5, 10].map((f) => f * power).find((s) => s >= least) || 1);
    for (let c = Math.ceil(view.x / step) * step; c < Math.min(width, view.x + view.width); c += step) {
      const x = plot.x + (c + 0.5 - view.x) * wide;
      context.fillRect(Math.round(x), plot.y + plot.height, Math.max(1, Math.round(ratio)), 4 * ratio);
      context.fillText(label(c), x, plot.y + plot.height + 7 * ratio);
    }
    context.save();
    context.translate(11 * ratio, plot.y + plot.height / 2);
    context.rotate(-Math.PI / 2);
    context.textBaseline = "middle";
    context.fillText("layer", 0, 0);
    context.restore();
    context.textAlign = "left";
    context.fillText("index", 4 * ratio, plot.y + plot.height + 7 * ratio);
  }

  /** Triangles above the columns of the leading indices, with their numbers where there is room. */
  marks({ marks, label }, view) {
    const { context, plot, ratio } = this;
    const wide = plot.width / view.width;
    context.fillStyle = this.ink;
    context.font = `600 ${11 * ratio}px ${this.font}`;
    context.textAlign = "center";
    context.textBaseline = "bottom";
    const taken = [];
    for (const column of marks) {
      if (column + 1 <= view.x || column >= view.x + view.width) continue;
      const x = plot.x + (column + 0.5 - view.x) * wide;
      const half = 4 * ratio;
      context.beginPath();
      context.moveTo(x - half, plot.y - 8 * ratio);
      context.lineTo(x + half, plot.y - 8 * ratio);
      context.lineTo(x, plot.y - 1.5 * ratio);
      context.fill();
      const text = String(label(column));
      const room = (context.measureText(text).width + 6 * ratio) / 2;
      const middle = Math.max(plot.x + room - 4 * ratio, Math.min(plot.x + plot.width - room + 4 * ratio, x));
      if (taken.every(([at, other]) => Math.abs(at - middle) > room + other)) {
        taken.push([middle, room]);
        context.fillText(text, middle, plot.y - 9 * ratio);
      }
    }
  }

  cursor({ cursor }, view) {
    if (!cursor) return;
    const { context, plot, ratio } = this;
    const [wide, tall] = [plot.width / view.width, plot.height / view.height];
    const x = plot.x + (cursor.column - view.x) * wide;
    const y = plot.y + (cursor.row - view.y) * tall;
    context.lineWidth = 2 * ratio;
    context.strokeStyle = this.ink;
    const [w, h] = [Math.max(wide, 5 * ratio), Math.max(tall, 5 * ratio)];
    context.strokeRect(x + (wide - w) / 2 - ratio, y + (tall - h) / 2 - ratio, w + 2 * ratio, h + 2 * ratio);
    context.lineWidth = 1;
  }

  message(text) {
    const { context, plot, ratio } = this;
    context.fillStyle = this.soft;
    context.font = `${13 * ratio}px ${this.font}`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText(text, plot.x + plot.width / 2, plot.y + plot.height / 2, plot.width);
  }

  /** The cell under a pointer, and where in the plot it is (0..1); null outside. */
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const across = ((event.clientX - box.left) * this.ratio - this.plot.x) / this.plot.width;
    const down = ((event.clientY - box.top) * this.ratio - this.plot.y) / this.plot.height;
    if (!this.picture || across < 0 || across >= 1 || down < 0 || down >= 1) return null;
    const column = Math.min(this.picture.width - 1, Math.floor(this.view.x + across * this.view.width));
    const row = Math.min(this.picture.height - 1, Math.floor(this.view.y + down * this.view.height));
    return { ...this.strongest(row, column), across, down };
  }

  /** Where a pixel has many columns: the one that it shows. */
  strongest(row, column) {
    const { values, width } = this.picture;
    const reach = this.view.width / this.plot.width;
    if (!values || reach <= 1) return { row, column };
    const first = Math.max(0, Math.floor(column - reach));
    let best = column;
    for (let c = first; c <= Math.min(width - 1, column + reach); c++) {
      if (Math.abs(values[row * width + c]) > Math.abs(values[row * width + best])) best = c;
    }
    return { row, column: best };
  }
}
