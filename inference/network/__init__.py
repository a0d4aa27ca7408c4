"""The network: as it is trained, as it runs, and its weights."""
