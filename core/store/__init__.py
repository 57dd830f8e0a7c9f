"""Text and adapters on objects: packed shards, a Parquet manifest, optimistic commits."""
