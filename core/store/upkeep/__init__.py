"""A store's upkeep: compaction, collection, erasure, verification, comparison."""
