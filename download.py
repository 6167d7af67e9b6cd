"""Download a model into weights/; the same as python -m llama3_raw.download."""

import sys

from llama3_raw.download.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
