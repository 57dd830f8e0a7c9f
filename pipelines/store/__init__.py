"""`imprint store`: a store's contents and its upkeep on the command line."""
