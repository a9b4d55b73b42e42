"""The methods of an evaluation, by name."""

from __future__ import annotations

from collections.abc import Sequence

from realigner.errors import UsageError
from realigner.evaluation.constant_vectors import MeanDelta, MeanDifference, RandomVectors, TrainedVectors
from realigner.evaluation.irm_methods import IRMMethod, SentenceIRM
from realigner.evaluation.layer_edits import LayerEdits
from realigner.evaluation.method_protocol import Method
from realigner.evaluation.peft_methods import IA3, LoRA, Prefix, Shadow
from realigner.evaluation.prompting import Bare, BestPrompt, FewShot

METHODS: Sequence[Method] = (
    Bare(name="bare", about="The host as it is."),
    IRMMethod(name="untrained", about="The compact IRM as it is initialised.", steps=0),
    RandomVectors(
        name="random",
        about="A random constant vector in each layer, as long as the mean of the trained IRM's deltas there.",
        needs=("irm",),
    ),
    BestPrompt(name="prompt", about="The best of five system prompts.", needs=("score",)),
    FewShot(name="few-shot", about="Three questions and replies in the tone before the question."),
    MeanDifference(
        name="mean-difference",
        about="In each layer the mean residual over toned replies less that over the host's own, at the best strength.",
        needs=("score",),
    ),
    TrainedVectors(name="constant", about="A trained constant vector in each layer.", rates=(1e-2, 3e-2, 1e-1)),
    TrainedVectors(name="shared", about="One trained constant vector for all layers.", rates=(1e-2, 3e-2, 1e-1), shared=True),
    MeanDelta(name="mean-delta", about="The mean of the trained IRM's own deltas, as constant vectors.", needs=("irm",)),
    LayerEdits(
        name="psr",
        about="In each layer one direction, as strong as the token's activation there says (after PSR, arXiv 2605.03907).",
        rates=(1e-3, 3e-3, 1e-2),
        edit="psr",
        rank=1,
    ),
    LayerEdits(name="reft", about="LoReFT of rank 4 in each layer.", rates=(1e-4, 3e-4, 1e-3), edit="reft", rank=4),
    LoRA(name="lora", about="LoRA of rank 8 on queries and values.", rates=(1e-3, 2e-3, 5e-3)),
    Shadow(name="shadow", about="ShadowPEFT with PEFT's defaults.", rates=(3e-4, 1e-3, 3e-3)),
    IA3(name="ia3", about="IA3: a trained factor for each key, value and MLP neuron.", rates=(3e-3, 1e-2, 3e-2)),
    Prefix(name="prefix", about="Prefix tuning with 20 virtual tokens.", rates=(3e-3, 1e-2, 3e-2)),
    IRMMethod(name="irm-compact", about="An IRM of the compact preset.", rates=(3e-3, 1e-2, 2e-2)),
    IRMMethod(name="irm-paper", about="An IRM of the paper's shape.", rates=(3e-5, 1e-4, 3e-4), preset="paper"),
    SentenceIRM(
        name="irm-sentence", about="A compact IRM that learned from the host with a system prompt.", rates=(1e-3, 3e-3, 1e-2)
    ),
)


def find_method(name: str) -> Method:
    """A method by its name.

    Raises:
        UsageError: when there is none of it, with those that there are.

    Example:
        >>> find_method("lora").describe()["rank"]
        8
    """
    for method in METHODS:
        if method.name == name:
            return method
    raise UsageError(f"method: unknown {name!r}; known are {', '.join(method.name for method in METHODS)}")
