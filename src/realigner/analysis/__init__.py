"""What a trace shows, as pure functions on labelled arrays (no torch)."""

from realigner.analysis.maps import FIRST_GENERATED, chosen_tokens, leading_indices, mean_map

__all__ = ["FIRST_GENERATED", "chosen_tokens", "leading_indices", "mean_map"]
