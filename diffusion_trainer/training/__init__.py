"""Training: the thin Lightning module, EMA, optimizer, sharding, checkpoints, randomness."""
