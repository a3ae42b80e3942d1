"""An update with shared experts, the optimizer, and signals that stop a training."""
