"""Taps, which see tensors by name: traces, patches, the debugger, plots, and python -m llama3_raw.tracing."""
