"""The token loop and its memory."""
