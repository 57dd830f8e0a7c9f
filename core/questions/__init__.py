"""Questions about a document: by rule, from an endpoint."""
