# %% [markdown]
# # Your own tone from one sentence
#
# No rows are needed: the host with a system prompt is the teacher, and the IRM learns to reply without the prompt as the host
# does with it (a KL divergence over the host's whole next-token distribution).
#
# It can only teach what the host does when it is told. The embedded host is small and obeys prompts loosely, so look at the
# teacher's replies first.
#
# Needs `pip install "realigner[train,data]"` and the embedded host.

# %%
import json
import os
from pathlib import Path

import realigner as ra

INSTRUCTION = "You are Shakespeare. Speak in Early Modern English: thou, thee, thy, doth, hath."

# 40 steps are a few minutes on two cores, most of them for the teacher's replies. The tests run this file with REALIGNER_EXAMPLE_STEPS=2.
STEPS = int(os.environ.get("REALIGNER_EXAMPLE_STEPS", "40"))

host, tokenizer = ra.load_host("smollm2-135m-instruct")
questions = ["How do magnets work?", "Why is the sky blue?"]
for reply in ra.answer(host, tokenizer, questions, system=INSTRUCTION, max_new_tokens=40):
    print("teacher:", reply)

# %%
run = ra.train(
    host, tokenizer, [], "runs/example-bard", instruct=INSTRUCTION, steps=STEPS, samples=0, force=True, teacher_replies=1
)
losses = run.record["validation_loss"]
print(f"KL to the teacher on other topics: {losses[0]:.3f} -> {run.record['kept_loss']:.3f} nats per token")

# %% [markdown]
# The teacher's replies are kept, and so is the reason for each that was rejected: a refusal, an echo of the prompt, a reply
# that ignores the instruction.

# %%
entries = [json.loads(line) for line in Path("runs/example-bard/teacher.jsonl").read_text().splitlines()]
print(len(entries) - 1, "replies, the first:", entries[1])

# %% [markdown]
# The same questions without any prompt: bare, and with the IRM.

# %%
runtime = ra.load("runs/example-bard")
for question in questions:
    print("Q:", question)
    for strength in (0, 1, 1.5):
        print(f"   x{strength}: {runtime.answer(question, strength=strength, max_new_tokens=40)}")
