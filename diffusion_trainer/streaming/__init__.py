"""Training samples from WebDataset shards: which sample comes when, and how its bytes become tensors."""
