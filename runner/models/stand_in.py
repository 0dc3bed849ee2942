"""Modules that compute something else for a time: how the parts of a model are computed by the model's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import mlx.nn as nn

Call = Callable[..., Any]
"""Called with the index of the module among the replaced ones, the module's own `__call__`, and the arguments."""


@contextmanager
def stand_in(modules: Sequence[nn.Module], call: Call) -> Iterator[None]:
    """Call `call(index, own_call, *args, **kwargs)` in place of each of `modules` inside this context.

    A module's class is replaced by a subclass for the time being, so the model's structure and its other code stay as
    they are. Contexts can be nested: `own_call` then is the outer context's replacement.
    """
    classes: list[Any] = [type(module) for module in modules]
    try:
        for index, (module, cls) in enumerate(zip(modules, classes, strict=True)):
            module.__dict__[_attribute(cls)] = partial(call, index)
            module.__class__ = _replaced(cls)
        yield
    finally:
        for module, cls in zip(modules, classes, strict=True):
            module.__class__ = cls
            module.__dict__.pop(_attribute(cls), None)


def _attribute(cls: type) -> str:
    """Return the name under which a module of class `cls` holds its replacement: another one at each nesting."""
    return f"_stand_in_{len(cls.__mro__)}"


@cache
def _replaced(cls: Any) -> Any:
    attribute = _attribute(cls)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[attribute](partial(cls.__call__, self), *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call})


def output_of(module: nn.Module, run: Callable[[], Any]) -> Any:
    """Return what `module` returns at its first call in `run`, and compute nothing after it.

    Raises:
        LookupError: `run` does not call it.
    """

    def stop(index: int, own_call: Callable, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(own_call(*args, **kwargs))

    try:
        with stand_in([module], stop):
            run()
    except _Reached as reached:
        return reached.value
    raise LookupError(f"{type(module).__name__} is not called")


class _Reached(BaseException):
    """Ends the forward pass at a module's output; no model catches it."""

    def __init__(self, value: Any) -> None:
        self.value = value
