"""The app of ``realigner app``: base and realigned replies side by side, a slider for each IRM, a live map of what they add."""
