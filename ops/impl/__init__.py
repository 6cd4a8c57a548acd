"""One file for each way to compute `ops.routed_attention`; none imports another."""
