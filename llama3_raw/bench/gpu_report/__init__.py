"""A report on an NVIDIA GPU, in one command: what runs, how exactly and how fast, and what to change."""
