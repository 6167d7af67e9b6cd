"""`break_at`, the tap that stops in a debugger, in the frame of model.py where a tensor was just computed."""

from __future__ import annotations

import os
import pdb
import sys
from collections.abc import Sequence
from types import FrameType, TracebackType

from torch import Tensor

from ..model import forward
from ..ops import Scoped, Tap
from ..weights import dtype_name
from .taps import PatternTap


def break_at(*patterns: str) -> Tap:
    """Return a tap that stops in pdb, in the frame of model.py that just computed a tensor matching a pattern.

    There the tensor is a local, or `__return__` if the function returns it; its neighbours are locals too. A debugger
    set by $PYTHONBREAKPOINT or sys.breakpointhook is called in place of pdb. It stops in this tap; a line on stderr
    says how many frames up model.py is. When input that is not a terminal ends, the run continues without stopping.

    Args:
        patterns: tap names, with the wildcards of `Patterns`.

    Raises:
        bdb.BdbQuit: by the tap, if the user quits, as pdb does.
        UserError: by the tap, at the end of a pass in which a pattern matched nothing.
    """
    return _Break(patterns)


class _Break(PatternTap):
    """The tap that `break_at` returns."""

    def __init__(self, patterns: Sequence[str]):
        super().__init__(patterns)
        self._debugger = _Debugger()

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        if self._patterns.matching(name):
            if os.environ.get("PYTHONBREAKPOINT") or sys.breakpointhook is not sys.__breakpointhook__:
                if os.environ.get("PYTHONBREAKPOINT") != "0":  # 0 disables the stops
                    _, up = _frame_of_model()
                    frames = f"{up} frame{'s' if up > 1 else ''}"
                    print(f"llama3_raw: {_described(name, tensor)}, {frames} up", file=sys.stderr)
                sys.breakpointhook()
            else:
                self._debugger.stop(name, tensor)
        return tensor


def _frame_of_model() -> tuple[FrameType, int]:
    """Return the frame of model.py that called the tap, and how many frames above the caller it is."""
    frame, up = sys._getframe(1), 0
    while frame.f_code.co_filename != forward.__code__.co_filename:
        assert frame.f_back is not None, "break_at is a tap for model.forward"
        frame, up = frame.f_back, up + 1
    return frame, up


def _described(name: str, tensor: Tensor) -> str:
    return f"{name} {list(tensor.shape)} in {dtype_name(tensor.dtype)}"


class _Debugger(pdb.Pdb):
    """One pdb for all stops of a run, so that breakpoints set at one stop stay for the next."""

    def __init__(self) -> None:
        super().__init__(
            stdout=None if sys.stdout.isatty() else sys.stderr,  # stdout is for the generated text only
            nosigint=True,  # the command handles Ctrl-C
            # do not step into the code that sets up a stop, nor into taps
            skip=("bdb", f"{__package__}.*", Scoped.__module__),
        )
        self._to_show: tuple[str, Tensor] | None = None
        self._input_ended = False

    def stop(self, name: str, tensor: Tensor) -> None:
        """Make pdb stop in the frame of model.py that called the tap: at its next line, or where it returns."""
        if self._input_ended:
            return
        frame, _ = _frame_of_model()
        self._to_show = name, tensor
        sys.settrace(None)  # ends a step in progress
        self.set_trace(frame)
        self.set_next(frame)  # not in a tap after this one

    def set_stepinstr(self) -> None:
        """Stop at the next line, where the tensor has a name; since Python 3.13 set_trace calls this to stop here."""
        self.set_step()

    def interaction(self, frame: FrameType | None, traceback: TracebackType | None) -> None:
        """Print at a stop which tensor it is for."""
        if self._to_show is not None and frame is not None:
            name, tensor = self._to_show
            self._to_show = None
            bound = next((f", here {local}" for local, value in frame.f_locals.items() if value is tensor), "")
            self.message(f"llama3_raw: {_described(name, tensor)}{bound}; c continues, q quits")
        super().interaction(frame, traceback)

    def do_run(self, arg: str) -> None:
        """Print that the run cannot be restarted from within; pdb would end it with a traceback."""
        self.error("the run cannot be restarted from here; q quits")

    do_restart = do_run

    def do_EOF(self, arg: str) -> bool | None:
        """Quit in a terminal (Ctrl-D); at the end of other input continue without further stops."""
        if sys.stdin.isatty():
            return super().do_EOF(arg)
        self.message("\nllama3_raw: no more commands for pdb; the run continues without it")
        self._input_ended = True
        self.clear_all_breaks()
        return self.do_continue("")
