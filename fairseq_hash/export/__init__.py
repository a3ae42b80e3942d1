"""Models taken out of fairseq: `fairseq-hash export`.

`hf` writes the folder that transformers loads, `config` says what a checkpoint is in `config.json`, `tokens` finds its
dictionary and SentencePiece model, `tensors` writes weights one after the other, `card` the model card. The two files
`modeling_fairseq_hash.py` and `tokenization_fairseq_hash.py` are copied into that folder: they import neither fairseq
nor this package, and nothing here imports them.
"""
