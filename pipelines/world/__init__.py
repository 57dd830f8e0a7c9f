"""The reference world: invented documents with questions, its tokenizer and its weights."""
