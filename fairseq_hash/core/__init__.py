"""What every room uses: errors, checks of values, files, progress. No model, no fairseq."""
