"""Corpora of files as rows of documents."""
