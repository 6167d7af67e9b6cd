"""Checkpoints: files are mapped, checked, sharded, loaded as `Weights` and written."""
