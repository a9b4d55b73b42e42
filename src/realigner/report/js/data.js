// Numbers of the page: base64 -> gzip -> codes -> floats, each only when it is asked for. Written by report/quantize.py.

async function unpacked(text) {
  const raw = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/** Every code's value: soft * sinh(code * asinh(top / soft) / levels); the lowest code is NaN. */
function valuesOfCodes({ bits, soft, top }) {
  const levels = bits === 8 ? 127 : 32767;
  const values = new Float32Array(2 * levels + 2);
  const step = Math.asinh(top / soft) / levels;
  for (let code = -levels; code <= levels; code++) values[code + levels + 1] = soft * Math.sinh(code * step);
  values[0] = NaN;
  return values;
}

function codesOf(buffer, bits) {
  return bits === 8 ? new Int8Array(buffer) : new Int16Array(buffer);
}

function decoded(codes, how, into = new Float32Array(codes.length)) {
  const values = valuesOfCodes(how);
  const zero = values.length / 2;
  for (let i = 0; i < codes.length; i++) into[i] = values[codes[i] + zero];
  return into;
}

class Book {
  constructor(root) {
    this.root = root;
    this.facts = JSON.parse(root.querySelector("script[data-facts]").textContent);
    this.layers = this.facts.layers;
    this.neurons = Array.isArray(this.facts.neurons) ? this.facts.neurons : null;
    this.width = this.neurons ? this.neurons.length : this.facts.neurons;
    this.height = this.layers.length;
    this.cells = this.width * this.height;
    this.runs = new Map(this.facts.runs.map((run, number) => [run.name, { ...run, number }]));
    this.texts = new Map(this.facts.texts.map((text) => [`${text.run} ${text.prompt}`, text]));
    this.promises = new Map();
    this.ready = new Map();
  }

  text(run, prompt) {
    return this.texts.get(`${run} ${prompt}`);
  }

  /** The label of a column, and the column of a label. */
  label(column) {
    return this.neurons ? this.neurons[column] : column;
  }

  column(label) {
    return this.neurons ? this.neurons.indexOf(label) : label;
  }

  once(key, make) {
    if (!this.promises.has(key)) {
      this.promises.set(key, make().then((value) => (this.ready.set(key, value), value)));
    }
    return this.promises.get(key);
  }

  blob(name) {
    return unpacked(this.root.querySelector(`script[data-blob="${name}"]`).textContent);
  }

  /** A run's mean maps: {signed, absolute}. */
  means(name) {
    const run = this.runs.get(name);
    return this.once(`means ${name}`, async () => {
      const codes = codesOf(await this.blob(`run-${run.number}-maps`), run.maps[0].bits);
      return {
        signed: decoded(codes.subarray(0, this.cells), run.maps[0]),
        absolute: decoded(codes.subarray(this.cells), run.maps[1]),
      };
    });
  }

  /** Make a run's tokens ready for `token`. */
  tokens(name) {
    const run = this.runs.get(name);
    const how = run.tokens;
    if (!how) return Promise.resolve(null);
    return this.once(`tokens ${name}`, async () => {
      if (how.kind === "tokens") {
        return { codes: codesOf(await this.blob(`run-${run.number}-tokens`), how.bits), values: valuesOfCodes(how) };
      }
      const [basis, weights] = await Promise.all([
        this.blob(`run-${run.number}-basis`), this.blob(`run-${run.number}-weights`)]);
      const steps = Float32Array.from(new Int16Array(weights), (step, i) => step * how.scale[i % how.rank]);
      return { basis: decoded(codesOf(basis, how.bits), how), weights: steps, rank: how.rank };
    });
  }

  /** One token's map [layer * neuron], written into `into`; null where the page does not have it. */
  token(name, prompt, position, into) {
    const text = this.text(name, prompt);
    const kept = this.ready.get(`tokens ${name}`);
    const place = text && text.store;
    if (!kept || !place || position < place.first || position >= place.first + place.count) return null;
    const at = place.at + position - place.first;
    if (kept.codes) {
      const zero = kept.values.length / 2;
      const start = at * this.cells;
      for (let i = 0; i < this.cells; i++) into[i] = kept.values[kept.codes[start + i] + zero];
    } else {
      this.rebuild(kept, at, into);
    }
    for (const layer of text.missing) into.fill(NaN, layer * this.width, (layer + 1) * this.width);
    return into;
  }

  /** Sum of components; block by block, so that what is summed stays near the processor. */
  rebuild({ basis, weights, rank }, at, into) {
    const block = 4096;
    for (let from = 0; from < this.cells; from += block) {
      const to = Math.min(this.cells, from + block);
      into.fill(0, from, to);
      for (let component = 0; component < rank; component++) {
        const weight = weights[at * rank + component];
        const start = component * this.cells;
        for (let i = from; i < to; i++) into[i] += weight * basis[start + i];
      }
    }
  }
}
