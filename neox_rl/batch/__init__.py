"""Groups of rollouts to packed micro-batches: advantages, staleness, loss weights, packing, recording."""
