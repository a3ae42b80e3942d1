"""A dry run: one update of one rank through the real trainer, on tensors without data, in a world of any size.

`update` runs it, `world` is what the trainer believes in, `known_rows` says how many rows travel. What is seen on the
way: `memory`, `collectives`, and the time of each operation (`roofline`, on `hardware`).
"""
