"""From documents to checked adapters: the interface of all methods, and the quality gate."""
