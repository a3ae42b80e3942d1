"""What fairseq registers: the model `hash_transformer_lm` and the criterion `hash_moe`."""
