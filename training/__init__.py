"""What makes an epoch a run that survives: settings, state, checkpoints, processes, signals, logs and data loading."""
