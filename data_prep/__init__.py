"""Data preparation: text to binarized data (`python -m data_prep`)."""
