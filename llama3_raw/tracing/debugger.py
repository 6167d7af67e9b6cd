"""Stopping in a debugger, in the frame of model.py where a tensor was just made."""

from __future__ import annotations

import os
import pdb
import sys
from types import FrameType, TracebackType

from torch import Tensor

from ..model import forward
from ..ops import Scoped, Tap
from ..weights import in_words
from .taps import Patterns


def break_at(*patterns: str) -> Tap:
    """A tap that stops in pdb where a tensor that one of the patterns means was just made, in the frame of model.py.

    There it is a local, or `__return__` where a function returns it, and its neighbours are locals. Another debugger,
    which $PYTHONBREAKPOINT or sys.breakpointhook names, is called in its place and stops in this tap; a line says how
    many frames up that of model.py is. Input that is no terminal and ends makes the run go on without a stop.

    The tap raises bdb.BdbQuit, as pdb does, where the user quits, and UserError at the end of a pass in which a pattern
    means nothing.
    """
    wanted = Patterns(patterns)
    debugger = _Debugger()

    def breaking(name: str, tensor: Tensor) -> Tensor:
        if wanted.matching(name):
            if os.environ.get("PYTHONBREAKPOINT") or sys.breakpointhook is not sys.__breakpointhook__:
                if os.environ.get("PYTHONBREAKPOINT") != "0":  # which says not to stop
                    _, up = _frame_of_model()
                    frames = f"{up} frame{'s' if up > 1 else ''}"
                    print(f"llama3_raw: {_described(name, tensor)}, {frames} up", file=sys.stderr)
                sys.breakpointhook()
            else:
                debugger.stop(name, tensor)
        return tensor

    return breaking


def _frame_of_model() -> tuple[FrameType, int]:
    """The frame of model.py that called the tap, and how many frames above the caller it is."""
    frame, up = sys._getframe(1), 0
    while frame.f_code.co_filename != forward.__code__.co_filename:
        assert frame.f_back is not None, "break_at is a tap for model.forward"
        frame, up = frame.f_back, up + 1
    return frame, up


def _described(name: str, tensor: Tensor) -> str:
    return f"{name} {list(tensor.shape)} in {in_words(tensor.dtype)}"


class _Debugger(pdb.Pdb):
    """One pdb for all stops of a run, so that what the user sets at one holds at the next."""

    def __init__(self) -> None:
        super().__init__(
            stdout=None if sys.stdout.isatty() else sys.stderr,  # stdout is for the text alone
            nosigint=True,  # Ctrl-C is up to the tool
            # not to be stepped into: how a stop is set up, and the taps
            skip=("bdb", __name__, f"{__package__}.taps", f"{__package__}.record", Scoped.__module__),
        )
        self._to_show: tuple[str, Tensor] | None = None
        self._input_ended = False

    def stop(self, name: str, tensor: Tensor) -> None:
        """Has pdb stop in the frame of model.py that called the tap: at its next line, or where it returns."""
        if self._input_ended:
            return
        frame, _ = _frame_of_model()
        self._to_show = name, tensor
        sys.settrace(None)  # a step that was under way ends here
        self.set_trace(frame)
        self.set_next(frame)  # not in a tap behind this one

    def set_stepinstr(self) -> None:
        """What set_trace calls from Python 3.13 on, to stop at once; but only the next line has the tensor by name."""
        self.set_step()

    def interaction(self, frame: FrameType | None, traceback: TracebackType | None) -> None:
        """Says at a stop which tensor it is for."""
        if self._to_show is not None and frame is not None:
            name, tensor = self._to_show
            self._to_show = None
            bound = next((f", here {local}" for local, value in frame.f_locals.items() if value is tensor), "")
            self.message(f"llama3_raw: {_described(name, tensor)}{bound}; c goes on, q ends")
        super().interaction(frame, traceback)

    def do_run(self, arg: str) -> None:
        """Says that a run cannot begin anew from within it; pdb would end it with a traceback."""
        self.error("the run cannot begin anew from here; q ends it")

    do_restart = do_run

    def do_EOF(self, arg: str) -> bool | None:
        """Ends as q does in a terminal (Ctrl-D); at the end of other input the run goes on and stops no more."""
        if sys.stdin.isatty():
            return super().do_EOF(arg)
        self.message("\nllama3_raw: no more commands for pdb; it goes on without it")
        self._input_ended = True
        self.clear_all_breaks()
        return self.do_continue("")
