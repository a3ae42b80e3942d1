"""What the experts of a run do: which tokens they serve, how they differ, what a route has to do with token ids."""
