"""What help texts show of the library, without importing it and torch. tests/cli/test_parsers.py compares the two."""

DTYPES = ("bfloat16", "float16", "float32")
QUANTIZED = ("int8", "int4")
FILE_FORMATS = ("original", "safetensors")
MAX_DECODE_ROWS = 16
MAX_DRAFT_TOKENS = 15
TEXTS_AT_ONCE = 16  # of decoding.scoring
TOP_K = 10  # of compare.difference
CHAT_CONTEXT = 8192
PERPLEXITY_CONTEXT, LLAMA_CPP_CONTEXT = 2048, 512
WINDOWS = ("sliding", "llama.cpp")
SYNTHETIC = ("8b", "1b", "3b", "70b-1layer", "70b", "405b")
BASELINES = ("transformers", "transformers-compiled", "llama.cpp", "llama.cpp:TYPE", "stored", "two-processes")
TAP_LENGTH = 17
