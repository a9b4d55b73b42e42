"""What a trace shows, as pure functions on labelled arrays (no torch)."""

from realigner.analysis.maps import FIRST_GENERATED, leading_indices, run_maps, text_maps
from realigner.analysis.striation import eta_squared, icc, kendall_w, omega_squared, striation, svd_share

__all__ = [
    "FIRST_GENERATED",
    "eta_squared",
    "icc",
    "kendall_w",
    "leading_indices",
    "omega_squared",
    "run_maps",
    "striation",
    "svd_share",
    "text_maps",
]
