"""Files, memory, processors and processes, independent of models."""
