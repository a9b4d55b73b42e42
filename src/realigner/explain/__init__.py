"""Why this index: what a host's weights, states and gradients say of an index of its residual stream, and what edits prove."""
