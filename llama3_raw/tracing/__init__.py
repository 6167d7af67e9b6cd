"""Taps: what sees tensors by name. Traces, the debugger, plots; the command python -m llama3_raw.tracing."""
