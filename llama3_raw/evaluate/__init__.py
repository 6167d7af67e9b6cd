"""python -m llama3_raw.evaluate: benchmarks, the cost of a compression, and scores of continuations."""
