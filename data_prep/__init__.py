"""Data preparation: from text to binarized data (`python -m data_prep`)."""
