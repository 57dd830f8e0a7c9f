"""Corpora into stores of adapters, with Ray Data."""
