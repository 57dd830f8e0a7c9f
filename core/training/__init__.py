"""What both methods share to train: examples, objectives, batches, schedules, metrics."""
