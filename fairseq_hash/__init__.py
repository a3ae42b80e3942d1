"""A fairseq plugin for language models with sparse feed-forward layers (`--user-dir fairseq_hash`)."""
