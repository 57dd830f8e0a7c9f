"""Training with Ray Train and DeepSpeed, fed by Ray Data."""
