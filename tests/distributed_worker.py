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
from safetensors.torch import save_file
from transformers import TrainingArguments

from realigner.irm_config import IRMConfig
from realigner.training import Recipe, make_recipe, teacher, train
from realigner.training.callbacks import Log
from realigner.training.trainer import IRMTrainer
from realigner.tuner import tuner_of
from tests.tiny import some_rows, tiny_pair

RECIPE = make_recipe(
    steps=6, batch_size=8, evaluations=2, samples=0, optimizer="sgd", learning_rate=0.1, warmup=0, schedule="constant",
    dropout=0.0, report_to=[], threads=1,
)  # fmt: skip


def taught_recipe(questions: Path) -> Recipe:
    """Rows, and a teacher whose every reply is kept, though the host obeys nobody."""
    teacher.OBEDIENCE, teacher.REPLY_TOKENS, teacher.TOGETHER = -9.0, 12, 4
    return RECIPE.changed(instruct="Say z.", tone="z", data_weight=0.4, questions=str(questions), validation=0.3)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight rows of tokens and what each position is to predict."""
    ids = torch.randint(2, 250, (8, 12), generator=torch.Generator().manual_seed(7))
    return ids, ids.roll(-1, dims=1)


def sharded(seed: int = 1) -> tuple[Any, Any]:
    """A model whose host and network are sharded by FSDP2 over the processes, and its network."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    host, _ = tiny_pair()
    torch.manual_seed(seed)
    model = get_peft_model(host, IRMConfig())
    for layer in host.model.layers:
        fully_shard(layer, mesh=mesh)
    network = tuner_of(model).registry.network("default")
    fully_shard(network, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, network


def backward(model: Any) -> None:
    """The loss of each process's half of the batch, and its gradients."""
    ids, targets = (part[dist.get_rank() * 4 : dist.get_rank() * 4 + 4] for part in batch())
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]


def gathered(model: Any) -> dict[str, torch.Tensor]:
    """The network's whole weights."""
    parameters: dict[str, Any] = dict(tuner_of(model).registry.network("default").named_parameters())
    return {name: parameter.full_tensor() for name, parameter in parameters.items()}


def fsdp(out: Path) -> None:
    """Gradients of a sharded IRM."""
    dist.init_process_group("gloo")
    model, network = sharded()
    backward(model)
    grads: dict[str, Any] = {name: p.grad for name, p in network.named_parameters()}
    gradients = {name: grad.full_tensor() for name, grad in grads.items()}
    if dist.get_rank() == 0:
        torch.save(gradients, out)
    dist.destroy_process_group()


def fsdp_checkpoint(out: Path) -> None:
    """Two steps, a checkpoint, a third step; another model and optimiser take the checkpoint and the third step: equal."""
    dist.init_process_group("gloo")

    def trainer_of(model: Any, network: Any) -> IRMTrainer:
        trainer = IRMTrainer.__new__(IRMTrainer)  # what Trainer's preparation leaves, without a GPU to prepare for
        trainer.model = trainer.model_wrapped = model
        trainer.is_fsdp_enabled, trainer.tokens = True, 7
        trainer.optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1 / (step + 1))
        trainer.args = TrainingArguments(str(out), use_cpu=True)
        return trainer

    def steps(trainer: IRMTrainer, count: int) -> None:
        for _ in range(count):
            trainer.optimizer.zero_grad()
            backward(trainer.model)
            trainer.optimizer.step()
            trainer.lr_scheduler.step()

    whole, again = (trainer_of(*sharded(seed)) for seed in (1, 2))
    steps(whole, 2)
    weights = {f"irm.{key}": value for key, value in gathered(whole.model).items()}
    if dist.get_rank() == 0:
        out.mkdir()
        save_file(weights, out / "adapter_model.safetensors")
    dist.barrier()
    whole._save_optimizer_and_scheduler(str(out))
    dist.barrier()
    again._load_from_checkpoint(str(out), again.model)
    again._load_optimizer_and_scheduler(str(out))
    for trainer in (whole, again):
        steps(trainer, 1)
    one, two = gathered(whole.model), gathered(again.model)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(two[key], weights[f"irm.{key}"]) for key in two)
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
    if what in ("fsdp", "fsdp_checkpoint"):
        globals()[what](out)
        return
    if what == "stop" and os.environ["RANK"] == "0":  # a scheduler may tell one process only
        Log.on_step_end = stop_at_3  # type: ignore[method-assign]
    host, tokenizer = tiny_pair()
    if what == "taught":
        train(host, tokenizer, some_rows(tone="z"), out, taught_recipe(out.parent / "questions.txt"), quiet=True)
        return
    train(host, tokenizer, some_rows(), out, RECIPE, quiet=True, resume=what == "resume")


if __name__ == "__main__":
    main()
