"""Everything that is only text: documents, sentences, tokens, parsing, retrieval, prompts."""
