// Colours of maps: two ramps a theme, and what of a map fills them.

const RAMPS = {
  // blue, ground, red: apart for every kind of colour vision; the middle is the page's ground
  light: {
    diverging: ["#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#fbfbfa", "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f"],
    sequential: ["#fbfbfa", "#fde5cf", "#fdc38d", "#f79464", "#e3604f", "#b93556", "#7f1d5c", "#45124f", "#1b0b33"],
    none: "#e3e6ea",
  },
  dark: {
    diverging: ["#b9dcff", "#7ab8f5", "#3f8ed0", "#245f96", "#183a58", "#14181f", "#4a2620", "#863a2b", "#cc5b3c", "#f58f63", "#ffd2b3"],
    sequential: ["#14181f", "#2a1c3f", "#51226a", "#86296b", "#bb3f5c", "#e4653f", "#f7963b", "#fbc766", "#fcf3c5"],
    none: "#2b313b",
  },
};
const STEPS = 255; // to each side

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

function between(ramp, t) {
  const place = t * (ramp.length - 1);
  const low = Math.min(ramp.length - 2, Math.floor(place));
  const [a, b] = [rgb(ramp[low]), rgb(ramp[low + 1])];
  return a.map((value, i) => Math.round(value + (b[i] - value) * (place - low)));
}

function pixel([r, g, b]) {
  return (255 << 24) | (b << 16) | (g << 8) | r; // little-endian RGBA
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** Pixels for -STEPS..STEPS, and the ramp as CSS. */
function palette(signed, dark = isDark()) {
  const { diverging, sequential, none } = RAMPS[dark ? "dark" : "light"];
  const pixels = new Int32Array(2 * STEPS + 1);
  for (let i = -STEPS; i <= STEPS; i++) {
    pixels[i + STEPS] = pixel(signed ? between(diverging, (i / STEPS + 1) / 2) : between(sequential, Math.abs(i) / STEPS));
  }
  const ramp = signed ? diverging : sequential;
  return { pixels, none: pixel(rgb(none)), css: `linear-gradient(to right, ${ramp.join(", ")})` };
}

/** The 99.9% quantile of |x| and the largest: what fills the ramp, linearly and with symlog. */
function extent(values) {
  const size = Float32Array.from(values, Math.abs).filter((x) => x === x).sort();
  if (!size.length) return { limit: 1, top: 1 };
  const top = size[size.length - 1] || 1;
  return { limit: size[Math.floor(0.999 * (size.length - 1))] || top, top };
}

/** x -> -1..1. Symlog is even in small values and logarithmic in large ones; it reaches the largest. */
function scaleOf({ limit, top }, symlog) {
  if (!symlog) return { full: limit, of: (x) => Math.max(-1, Math.min(1, x / limit)) };
  const soft = limit / 30;
  const whole = Math.log1p(top / soft);
  return { full: top, of: (x) => Math.max(-1, Math.min(1, (Math.sign(x) * Math.log1p(Math.abs(x) / soft)) / whole)) };
}

function short(x, digits = 3) {
  if (!Number.isFinite(x)) return "none";
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size >= 1e5 || size < 1e-3 ? x.toExponential(digits - 1) : String(Number(x.toPrecision(digits)));
  return text.replace("e+", "e").replaceAll("-", "−");
}
