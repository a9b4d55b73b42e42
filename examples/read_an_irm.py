# %% [markdown]
# # Read an IRM: what it adds, at which token, layer and neuron index
#
# Everything an IRM does passes through one tensor, the delta: `[token, layer, neuron]`. So it can be recorded, drawn and
# tested. The baseline is always the untrained IRM of the same seed: it adds something too, and that has structure of its own.
#
# Needs `pip install ".[study]"` in a checkout and the embedded host.

# %%
import os
from typing import Any

from matplotlib import pyplot as plt

import realigner as ra
from realigner.data import PAPER_PROMPTS
from realigner.traces.collect import trace_for_report

# 32 steps are under a minute on two quiet cores, and enough to see something; the demo takes 90.
# The tests run this file with REALIGNER_EXAMPLE_STEPS=2.
STEPS = int(os.environ.get("REALIGNER_EXAMPLE_STEPS", "32"))

host, tokenizer = ra.load_host("smollm2-135m-instruct")
settings: Any = {"steps": STEPS, "samples": 0, "evaluations": 1}
run = ra.train(host, tokenizer, ra.authored("anger"), "runs/example-anger", **settings, force=True, quiet=True)
host = run.model.unload()  # bare again

# %% [markdown]
# Record one reply with every delta. A trace is an `xarray.Dataset` with one flat token axis and a label for each token.

# %%
runtime = ra.load("runs/example-anger")
with ra.record(runtime.model, keep="raw") as trace:
    print(runtime.answer(PAPER_PROMPTS[5], max_new_tokens=30))
print(dict(trace.delta.sizes))

# %% [markdown]
# Which tokens get the most? The energy of a token is the sum of its squared deltas over layers and neurons.

# %%
energy = (trace.delta.astype("float32") ** 2).sum(["layer", "neuron"])
strongest = energy.to_series().sort_values(ascending=False).index[:5]
for token in strongest:
    print(f"{float(energy[token]):10.0f}  {trace.token_text.values[token]!r}")

# %% [markdown]
# Now the paper's seven prompts, with the untrained twin beside. `trace_for_report` writes a zarr store that survives a kill.

# %%
options: Any = {"max_new_tokens": 30, "force": True, "quiet": True}
path = trace_for_report(["runs/example-anger"], "runs/example-anger.zarr", host, tokenizer, **options)
recorded = ra.load_trace(path)
maps = ra.analysis.run_maps(recorded)  # mean |delta|, [run, layer, neuron]

# %%
# %matplotlib inline
figure, axes = plt.subplots(1, maps.sizes["run"], figsize=(10, 3.2), layout="constrained", sharey=True)
for axis, name in zip(axes, maps.run.values, strict=True):
    axis.imshow(maps.sel(run=name), aspect="auto", cmap="magma", interpolation="nearest")
    axis.set(title=str(name), xlabel="neuron index")
axes[0].set_ylabel("layer")
plt.show()

# %% [markdown]
# A vertical line is one index that stands out in many layers: a striation. Which indices lead, and do they lead everywhere?

# %%
trained = next(name for name in maps.run.values if not str(name).startswith("untrained"))
print(ra.analysis.leading_indices(maps.sel(run=trained), count=5).to_string())

# %% [markdown]
# The paper's claims, each with its statistic, null and interval. With one run, those about several runs
# (consensus) are left out. "Not supported" says what this trace does not show, and is no proof of the opposite.

# %%
found = ra.analysis.analyze(recorded, permutations=200, resamples=200)
for verdict in found.verdicts:
    print(f"{verdict['verdict'].upper():14} {verdict['claim']}")

# %% [markdown]
# One self-contained HTML page with all of it, token by token.

# %%
print(ra.build_report([path], "runs/example-anger.html", force=True)[0])
