"""Triton's interpreter, which runs the GPU's kernels on a CPU, slowly, and in fp16 as it cannot multiply bf16."""

from __future__ import annotations

import os
from typing import Any


def interpret_kernels() -> None:
    """Let the kernels run in the interpreter. To be called before they are imported.

    The interpreter of Triton 3.6 and older takes an array of one number for a number, which numpy 2.4 and newer refuse.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from triton.runtime import interpreter
    except ImportError:  # Triton is for Linux on x86-64
        return
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch
