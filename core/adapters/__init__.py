"""The frozen base and what changes it: base models, adapter specs, LoRAs, Gated Memories, codecs, foreign formats."""
