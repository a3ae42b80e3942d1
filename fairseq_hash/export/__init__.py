"""Export of models from fairseq: `fairseq-hash export`.

`hf` writes the folder that transformers loads, `config` makes its `config.json`, `tokens` finds the dictionary and the
SentencePiece model, `tensors` writes weights one after the other, `card` writes the model card. The two files
`modeling_fairseq_hash.py` and `tokenization_fairseq_hash.py` are copied into that folder: they import neither fairseq
nor this package, and nothing here imports them.
"""
