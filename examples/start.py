# %% [markdown]
# # Start: train an IRM, scale it, switch it off
#
# An injectable realignment model (IRM) is a small network beside a frozen language model. It reads the residual stream once,
# after the attention of layer 0, and adds a perturbation to the residual stream of every layer. Not one weight of the host
# changes.
#
# Needs `pip install ".[train]"` in a checkout and the embedded host (`realigner doctor` finds it). No GPU, no hub.

# %%
import os

from peft import get_peft_model

import realigner as ra

# 32 steps are under a minute on two quiet cores, and enough to hear the tone; the demo takes 90.
# The tests run this file with REALIGNER_EXAMPLE_STEPS=2.
STEPS = int(os.environ.get("REALIGNER_EXAMPLE_STEPS", "32"))

host, tokenizer = ra.load_host("smollm2-135m-instruct")  # or a hub id, a folder, a .gguf file
questions = ["How many apples can fit in a basket?", "Why is the sky blue?"]
for reply in ra.answer(host, tokenizer, questions, max_new_tokens=40):
    print(reply)

# %% [markdown]
# 360 questions with hand-written replies in anger, sadness and neutral come with the package. Splits are made by topic, so the
# validation loss below is on topics that the IRM has not seen.

# %%
rows = ra.authored("anger")
print(rows[0].question, "->", rows[0].text)

# %%
run = ra.train(host, tokenizer, rows, "runs/example-anger", steps=STEPS, samples=0, evaluations=1, force=True)
print(f"validation loss {run.record['validation_loss'][0]:.2f} -> {run.record['kept_loss']:.2f} nats per token")

# %% [markdown]
# The run's folder is a PEFT adapter. `ra.load` finds the host that it was made for and gives you something that answers.
# Strength 0 is the bare host to the bit, 1 is the IRM as trained; anything between and beyond works, negative too.

# %%
runtime = ra.load("runs/example-anger")
for strength in (0, 0.5, 1, 1.5):
    print(f"x{strength}: {runtime.answer(questions[0], strength=strength, max_new_tokens=40)}")

# %% [markdown]
# Strength belongs to a call, not to the model: one batch can hold several.

# %%
replies = runtime.answer([questions[1]] * 3, strength=[0, 1, -1], max_new_tokens=40)
for strength, reply in zip((0, 1, -1), replies, strict=True):
    print(f"x{strength}: {reply}")

# %% [markdown]
# An IRM that has not been trained yet is attached like any PEFT adapter, for any trainer that takes a PEFT model.

# %%
bare, _ = ra.load_host("smollm2-135m-instruct")
model = get_peft_model(bare, ra.IRMConfig(preset="compact"))
model.print_trainable_parameters()
