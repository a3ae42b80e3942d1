"""Studies: comparisons with a protocol, from a YAML to verdicts."""
