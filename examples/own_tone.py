# %% [markdown]
# # Your own tone from one sentence
#
# No rows are needed: the host with a system prompt is the teacher, and the IRM learns to reply without the prompt as the host
# does with it (a KL divergence over the host's whole next-token distribution).
#
# It can only teach what the host does when it is told. The embedded host is small and follows prompts poorly, so look at the
# teacher's replies first.
#
# Needs `pip install ".[train,data]"` in a checkout and the embedded host.

# %%
import json
import os
from pathlib import Path

import realigner as ra

INSTRUCTION = "You are a sad, weeping person. Everything makes you cry. Answer with sorrow and sigh."

# 60 steps are a few minutes on two cores. The tests run this file with REALIGNER_EXAMPLE_STEPS=2.
STEPS = int(os.environ.get("REALIGNER_EXAMPLE_STEPS", "60"))

host, tokenizer = ra.load_host("smollm2-135m-instruct")
questions = ["Which river runs through Prague?", "How do magnets work?"]
for reply in ra.answer(host, tokenizer, questions, system=INSTRUCTION, max_new_tokens=40):
    print("teacher:", reply)

# %%
run = ra.train(
    host, tokenizer, [], "runs/example-sorrow", instruct=INSTRUCTION, steps=STEPS, samples=0, force=True, teacher_replies=1
)
losses = run.record["validation_loss"]
print(f"KL to the teacher on other topics: {losses[0]:.3f} -> {run.record['kept_loss']:.3f} nats per token")

# %% [markdown]
# The teacher's replies are kept, and so is the reason for each that was rejected: a refusal, an echo of the prompt, a reply
# that ignores the instruction.

# %%
entries = [json.loads(line) for line in Path("runs/example-sorrow/teacher.jsonl").read_text().splitlines()]
print(len(entries), "replies;", entries[0])

# %% [markdown]
# The same questions without any prompt: bare, and with the IRM. The KL says that the IRM learned what the teacher does. The
# teacher itself hardly wept: the host is small. A larger host, or rows in the tone, get you further.

# %%
runtime = ra.load("runs/example-sorrow")
for question in questions:
    print("Q:", question)
    for strength in (0, 1, 1.5):
        print(f"   x{strength}: {runtime.answer(question, strength=strength, max_new_tokens=40)}")
