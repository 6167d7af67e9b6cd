"""The machine: files, memory, processors, processes. It knows nothing of models."""
