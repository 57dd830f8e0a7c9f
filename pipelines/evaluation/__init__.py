"""What adapters answer, beside the base and the controls."""
