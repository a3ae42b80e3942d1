"""How rows meet the weights of their experts: loops, grouped and padded matrix products, memory."""
