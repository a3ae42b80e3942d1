"""Experiments as Hydra configurations: what they say, how large they are, and whether they can run."""
