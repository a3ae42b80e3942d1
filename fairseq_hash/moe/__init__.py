"""The sparse layer: router, token dispatcher, experts. torch only; it knows no fairseq."""
