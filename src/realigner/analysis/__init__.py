"""Statistics of traces, as pure functions on labelled arrays (no torch).

`analyze` computes all of them; docs/statistics.md defines and validates every statistic.
"""

from realigner.analysis.consensus import Consensus, consensus, rank_biased_overlap, robust_rank_aggregation
from realigner.analysis.mean_maps import FIRST_GENERATED, leading_indices, run_maps, text_maps
from realigner.analysis.sparsity import gini, sparsity
from realigner.analysis.striation import eta_squared, icc, kendall_w, omega_squared, striation, svd_share
from realigner.analysis.timing import layer_counts, timing, top_histogram
from realigner.analysis.turns import turns
from realigner.analysis.verdicts import Analysis, analyze

__all__ = [
    "Analysis",
    "Consensus",
    "FIRST_GENERATED",
    "analyze",
    "consensus",
    "eta_squared",
    "gini",
    "icc",
    "kendall_w",
    "layer_counts",
    "leading_indices",
    "omega_squared",
    "rank_biased_overlap",
    "robust_rank_aggregation",
    "run_maps",
    "sparsity",
    "striation",
    "svd_share",
    "text_maps",
    "timing",
    "top_histogram",
    "turns",
]
