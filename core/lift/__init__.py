"""LIFT: fine-tuning on one long document, many documents at once."""
