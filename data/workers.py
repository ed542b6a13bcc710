"""Work in several processes: items in batches, results in order, memory bounded."""

import collections
import concurrent.futures.process
import multiprocessing
import os
import signal
import threading

from runtime.errors import UserError


def batches(items, limit, size=len):
    """Yield lists of items whose sizes add up to `limit` or just more: the work of one call."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def in_order(function, shared, items, workers):
    """Yield function(*shared, item) for every item, in order, from `workers` processes.

    `shared` is sent to each process once. At most two items per worker are under way. Raises
    UserError if a worker dies.
    """
    if workers == 1:
        for item in items:
            yield function(*shared, item)
        return
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=begin_worker, initargs=(function, shared)) as pool:
        waiting = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "a worker process died, perhaps for lack of memory; rerun the same command with fewer --workers"
            ) from None


def begin_worker(*job):
    """First thing in each new process: keep what `work` needs."""
    global function, shared
    function, shared = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=end_with_parent, daemon=True).start()


def work(item):
    return function(*shared, item)


def end_with_parent():
    """End this process with its parent; a killed one would leave its workers waiting forever."""
    multiprocessing.parent_process().join()
    os._exit(1)
