"""What a run finds around it in its process, and what is put back when it has ended: each run begins as the first did.

A run in a process of its own starts from the environment, the generators, the flags and the handlers that the process
was born with. In a worker the run before it may have changed them; here they are taken down once, and restored.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from mgm_exp.deferred import is_loaded
from mgm_exp.signals import STOP_SIGNALS


def gpu_answers() -> bool:
    """Whether this process can still compute on its GPUs; True where it has not used any.

    After some faults (an assertion in a kernel, an illegal access) no call succeeds any more until the process ends:
    every later run in it would fail for what one did.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # torch.AcceleratorError
        return False
    return True


class Surroundings:
    """The state of this process when it was made.

    Torch's is taken down when it is loaded, see :meth:`look`; what a run loads besides is not looked at.
    """

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self.folder = os.getcwd()
        self.argv = list(sys.argv)
        self.path = list(sys.path)
        self.signals = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.recursion = sys.getrecursionlimit()
        self.torch: _Torch | None = None
        self._is_frozen = False

    @contextmanager
    def of_a_run(self, arguments: list[str]) -> Iterator[None]:
        """Around one run: ``sys.argv`` is that of its own process, and all else is restored afterwards."""
        streams = sys.stdout, sys.stderr, sys.stdin
        root = logging.getLogger()
        handlers, level, disabled = list(root.handlers), root.level, logging.root.manager.disable
        mask = os.umask(0o077)
        os.umask(mask)
        try:
            # Entering forgets which warnings were shown already: each run shows its own.
            with warnings.catch_warnings():
                sys.argv = [self.argv[0], *arguments]
                yield
        finally:
            sys.stdout, sys.stderr, sys.stdin = streams
            root.handlers[:] = handlers
            root.setLevel(level)
            logging.disable(disabled)
            os.umask(mask)
            self.restore()

    def restore(self) -> None:
        """Puts everything back."""
        sys.argv, sys.path[:] = list(self.argv), self.path
        for name in set(os.environ) - set(self.environment):
            del os.environ[name]
        for name, value in self.environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        os.chdir(self.folder)
        sys.setrecursionlimit(self.recursion)
        for number, handler in self.signals.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        random.seed()  # as a new process: from the operating system
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        if self.torch is not None:
            self.torch.restore()
        elif "torch" in sys.modules:
            self.look()

    def tidy(self, *, is_less_kept: bool) -> None:
        """Collects what the run has left; what the libraries made is looked through once.

        Args:
            is_less_kept: Whether something that was kept between runs may be let go of now.
        """
        if is_less_kept:
            gc.unfreeze()
        gc.collect()
        if is_less_kept or not self._is_frozen:
            gc.freeze()
            self._is_frozen = True

    def look(self) -> None:
        """Takes down the state that torch is born with; loads it."""
        self.torch = _Torch()


class _Torch:
    """Torch's global state."""

    def __init__(self) -> None:
        import torch

        self.threads = torch.get_num_threads()
        self.dtype = torch.get_default_dtype()
        self.generator = torch.Generator().get_state()  # every process starts with this seed
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.precision = torch.get_float32_matmul_precision()
        self.cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32

    def restore(self) -> None:
        import torch

        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        torch.set_rng_state(self.generator)
        if torch.are_deterministic_algorithms_enabled() != self.deterministic:  # it loads torch's compiler
            torch.use_deterministic_algorithms(self.deterministic)
        torch.set_float32_matmul_precision(self.precision)
        cudnn = torch.backends.cudnn
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = self.cudnn
        torch.set_grad_enabled(True)
        if is_loaded("torch._dynamo"):  # it compiles no more than so many models of one kind in a process
            sys.modules["torch._dynamo"].reset()
        if torch.cuda.is_initialized() and gpu_answers():
            torch.cuda.empty_cache()
            torch.cuda.set_device(0)
            torch.cuda.manual_seed_all(torch.Generator().initial_seed())
