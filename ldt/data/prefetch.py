"""Work done ahead of its consumer by threads, in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Generator[tuple[Item, Result], None, None]:
    """(item, function(item)) in order, up to `depth` items ahead of the consumer; errors come in their turn.

    At most depth + 1 items are alive at any time, the consumer's included. When the consumer leaves, what has not begun
    is cancelled and what has is waited for.
    """
    pending: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) > depth:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        wait([future for _, future in pending if not future.cancel()])
