"""Data loading that can resume at any batch, and WebDataset shards."""
