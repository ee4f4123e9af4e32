"""Several processes: started without torch, deaf to Ctrl-C, and gone when their parent is, whatever ended it."""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process

from lit_sft.errors import RunFailed


class Workers:
    """Processes that call functions; a few more calls are handed out than they can make at once.

    A context: left in peace it waits for all calls, left by an exception it ends the processes. Whatever a call raised
    is raised by the next ``submit`` or at the end; RunFailed when a process has died.
    """

    def __init__(self, number: int) -> None:
        self.pool = ProcessPoolExecutor(number, get_context("spawn"), _start_worker)
        self.most, self.running = 2 * number, set()
        # Ctrl-C goes to every process of the terminal, and is the parent's to answer: the mask is inherited
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self.running |= {self.pool.submit(os.getpid) for _ in range(number)}  # they start now
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def submit(self, function: Callable, *arguments: object) -> None:
        """Have ``function`` called with ``arguments``; waits while too many calls wait already."""
        try:
            self.running.add(self.pool.submit(function, *arguments))
            self._wait_for(self.most)
        except BrokenProcessPool:
            raise _DIED from None

    def _wait_for(self, most: int) -> None:
        while len(self.running) > most:
            done, self.running = wait(self.running, return_when=FIRST_COMPLETED)
            for call in done:
                call.result()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._wait_for(0)
        except BrokenProcessPool:
            raise _DIED from None
        finally:
            for process in active_children() if kind or self.running else ():
                process.kill()
            self.pool.shutdown(cancel_futures=True)


_DIED = RunFailed("a worker process died, perhaps for want of memory; --num_workers 1 takes the least")


def _start_worker() -> None:
    """One thread of the tokenizer's library a process, and none that outlives the parent, whatever ended it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
