"""One of two processes of test_distributed.py: python -m tests.distributed_worker WHAT OUT, under torchrun's variables."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model

from realigner.irm_config import IRMConfig
from realigner.training import make_recipe, train
from realigner.training.callbacks import Log
from realigner.tuner import tuner_of
from tests.tiny import some_rows, tiny_pair

RECIPE = make_recipe(
    steps=6, batch_size=8, evaluations=2, samples=0, optimizer="sgd", learning_rate=0.1, warmup=0, schedule="constant",
    report_to=[], threads=1,
)  # fmt: skip


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight rows of tokens and what each position is to predict."""
    ids = torch.randint(2, 250, (8, 12), generator=torch.Generator().manual_seed(7))
    return ids, ids.roll(-1, dims=1)


def fsdp(out: Path) -> None:
    """Gradients of an IRM whose host and network are sharded by FSDP2, of each process's half of the batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    host, _ = tiny_pair()
    torch.manual_seed(1)
    model = get_peft_model(host, IRMConfig())
    for layer in host.model.layers:
        fully_shard(layer, mesh=mesh)
    network = tuner_of(model).registry.network("default")
    fully_shard(network, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids, targets = (part[dist.get_rank() * 4 : dist.get_rank() * 4 + 4] for part in batch())
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
    grads: dict[str, Any] = {name: p.grad for name, p in network.named_parameters()}
    gradients = {name: grad.full_tensor() for name, grad in grads.items()}
    if dist.get_rank() == 0:
        torch.save(gradients, out)
    dist.destroy_process_group()


def stop_at_3(self: Log, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    """In place of the log's own: SIGTERM after two steps."""
    if state.global_step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    if state.global_step >= state.max_steps:
        control.should_evaluate = True


def main() -> None:
    """Do what is asked; every warning is printed."""
    warnings.simplefilter("always")
    torch.set_num_threads(1)
    what, out = sys.argv[1], Path(sys.argv[2])
    if what == "fsdp":
        fsdp(out)
        return
    if what == "stop" and os.environ["RANK"] == "0":  # a scheduler may tell one process only
        Log.on_step_end = stop_at_3  # type: ignore[method-assign]
    host, tokenizer = tiny_pair()
    train(host, tokenizer, some_rows(), out, RECIPE, quiet=True, resume=what == "resume")


if __name__ == "__main__":
    main()
