"""Checkpoints: a main file that fairseq knows, and shards that hold the experts.

The main file (`checkpoint_best.pt`, ...) has all that is dense, and a manifest: which shards hold the experts' weights
and their optimizer state, and how to know these shards. Shards are written first, by all ranks at once, each expert
once; they are never changed. The main file is the commit record: it is written last, and renamed into place.

`shards` knows one file, `manifest` what the main file says, `sharded_tensor` a tensor of all experts that lies in
shards; `saving` and `loading` are what a training does, `directory` keeps its folder clean.
"""
