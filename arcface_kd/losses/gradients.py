"""Leave the class centers' gradient out of a backward pass."""

import contextlib
from collections.abc import Iterator

_wanted = [True]


def finds_center_gradients() -> bool:
    """Whether a backward pass finds the class centers' gradients along with the embeddings'."""
    return _wanted[-1]


@contextlib.contextmanager
def in_embeddings_alone() -> Iterator[None]:
    """Inside, backward passes leave out the class centers, whose gradient takes a pass of its own.

    ``autograd.grad`` with the embeddings alone does not say so to a function that has both for its inputs.
    """
    _wanted.append(False)
    try:
        yield
    finally:
        _wanted.pop()
