"""Give one block new behaviour by placing a class in front of its own.

Wrapping a block in another module would rename its parameters and hide its type from code that looks for it (weight
dtypes, isinstance checks, FSDP policies). Changing the class of the *instance* does neither, and ``super().forward`` is
the image library's own code. PyTorch does the same for FSDP2 and for parametrizations.
"""

from __future__ import annotations

import functools

from torch import nn


class InFront(nn.Module):
    """Base of classes made to stand in front of an image block's class."""

    title = "InFront"
    behind: type[nn.Module]

    def __reduce__(self):
        # these classes are made at run time; pickle and deepcopy make them again from what they are made of
        return revive, (own_class(self), *fronts_of(self)), self.__dict__


@functools.cache
def class_in_front(front: type[InFront], behind: type[nn.Module]) -> type[InFront]:
    return type(front.title + behind.__name__, (front, behind), {"behind": behind})


def put_in_front(block: nn.Module, front: type[InFront]) -> None:
    block.__class__ = class_in_front(front, type(block))


def put_innermost(block: nn.Module, front: type[InFront]) -> None:
    """Put a class directly in front of the block's own, behind all that stand there."""
    stand(block, [front, *fronts_of(block)])


def take_from_front(block: nn.Module, front: type[InFront]) -> None:
    """Undo ``put_in_front``, wherever among other classes it stands."""
    stand(block, [other for other in fronts_of(block) if other is not front])


def stand(block: nn.Module, fronts: list[type[InFront]]) -> None:
    block.__class__ = functools.reduce(lambda behind, other: class_in_front(other, behind), fronts, own_class(block))


def fronts_of(module: nn.Module) -> list[type[InFront]]:
    """What stands in front of a module's own class, in the order it was put there."""
    fronts, cls = [], type(module)
    while issubclass(cls, InFront):
        fronts, cls = [cls.__mro__[1], *fronts], cls.behind
    return fronts


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before anything was put in front of it."""
    cls = type(module)
    while issubclass(cls, InFront):
        cls = cls.behind
    return cls


def revive(image_class: type[nn.Module], *fronts: type[InFront]) -> nn.Module:
    cls = functools.reduce(lambda behind, front: class_in_front(front, behind), fronts, image_class)
    return cls.__new__(cls)
