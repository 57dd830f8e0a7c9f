"""SHINE: a hypernetwork writes a document's adapter in one forward pass."""
