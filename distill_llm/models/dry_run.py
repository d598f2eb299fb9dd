"""Code that runs as it is, without numbers: what it takes of memory and arithmetic is counted, and not computed.

Floating point tensors have a shape, a type and no storage. Whole numbers are real: they decide what happens next.
Imports torch at the top: import it inside functions.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from distill_llm.models.load import without_weights

Kind = Literal["weights", "teachers", "gradients", "states", "activations", "logits", "working"]

_REAL_UP_TO = 1 << 22  # entries that a tensor of whole numbers may really have
_EMPTY_UP_TO = 1 << 10  # the same where nothing is in it yet: that is noise for dropout, on which nothing depends
_ANSWERS: dict[Any, Any] = {
    torch.ops.aten._local_scalar_dense.default: lambda one: True if one.dtype == torch.bool else 1,
    torch.ops.aten.allclose.default: lambda *_: True,  # of two ways to one number
    torch.ops.aten.equal.default: lambda one, other: one is other,  # of two models
}
_MADE_OF_NUMBERS = ("arange", "scalar_tensor")  # and not of a shape


@contextmanager
def dry() -> Iterator[DryRun]:
    """While it lasts, models are made without weights, and nothing is computed with them.

    They stay where they are and of the type that they are, whatever they are moved ``to``.
    """
    with without_weights(), patch.object(nn.Module, "_apply", lambda self, *_, **__: self), DryRun() as run:
        yield run


class DryRun(TorchDispatchMode):
    """While it is entered, operations on weightless tensors are counted and not computed.

    A number that the code asks a weightless tensor for is 1, and a comparison holds. ``words``: sizes of vocabularies,
    by which logits are told from other tensors. ``live`` are bytes that are there, ``peak`` those when there were most.
    ``moved`` are bytes that operations read and wrote; ``events`` tell of tensors that came, with their size, and went,
    with -1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.words: set[int] = set()
        self.live: Counter[Kind] = Counter()
        self.peak: Counter[Kind] = Counter()
        self.flops, self.moved, self.calls = 0.0, 0.0, 0
        self.events: list[tuple[int, int]] = []
        self._known: dict[int, tuple[Any, Kind, int]] = {}

    def restart(self) -> None:
        """Forgets the peak and the counts, and goes on from what is there."""
        self.peak, self.flops, self.moved, self.calls = Counter(self.live), 0.0, 0.0, 0
        self.events = []

    def mark(self, tensor: Tensor, kind: Kind) -> None:
        """Says what a tensor's storage is for; ``stored_bytes`` on the tensor says what it takes, if it is not what it
        seems to be."""
        storage = tensor.untyped_storage()
        known = self._known.get(id(storage))
        if known is not None:
            self.live[known[1]] -= known[2]
        self._add(storage, kind, getattr(tensor, "stored_bytes", storage.nbytes()), new=known is None)

    def mark_model(self, model: nn.Module, kind: Kind) -> None:
        """All its weights and buffers, and its vocabulary, unless they are another's already."""
        for tensor in (*model.parameters(), *model.buffers()):
            known = self._known.get(id(tensor.untyped_storage()))
            if known is None or known[1] == "working":
                self.mark(tensor, kind)
        for part in model.modules():
            head = getattr(part, "get_output_embeddings", lambda: None)()
            if head is not None:
                self.words.add(head.weight.size(0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        given = [item for item in tree_iter((args, kwargs)) if isinstance(item, Tensor)]
        if any(isinstance(item, FakeTensor) for item in given):
            if func in _ANSWERS:
                return _ANSWERS[func](*given)
            made = func(*args, **kwargs)
        elif not given and _has_no_room(func, args, kwargs):
            with self.fake:
                made = func(*args, **kwargs)
        else:
            return func(*args, **kwargs)
        self._count(func, given, args, kwargs, made)
        return made

    def _count(self, func: Any, given: list[Tensor], args: Any, kwargs: Any, made: Any) -> None:
        out = [item for item in tree_iter(made) if isinstance(item, Tensor)]
        is_new = False
        for item in out:
            storage = item.untyped_storage()
            if id(storage) not in self._known:
                is_new = True
                is_logits = item.dim() > 1 and item.size(-1) in self.words
                self._add(storage, "logits" if is_logits else "working", storage.nbytes())
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=made)
        if is_new or func._schema.is_mutable:
            self.calls += 1
            self.moved += sum(item.numel() * item.element_size() for item in (*given, *out))

    def _add(self, storage: Any, kind: Kind, size: int, *, new: bool = True) -> None:
        key = id(storage)
        if new:
            self.events.append((key, size))
        self._known[key] = (weakref.ref(storage, partial(self._gone, key)), kind, size)
        self.live[kind] += size
        if self.live.total() > self.peak.total():
            self.peak = Counter(self.live)

    def _gone(self, key: int, _: Any) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self.events.append((key, -1))
            self.live[known[1]] -= known[2]


@contextmanager
def saved_for_backward(run: DryRun) -> Iterator[None]:
    """While it lasts, what autograd keeps for a backward pass is told from what is there for a moment."""

    def keep(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            known = run._known.get(id(tensor.untyped_storage()))
            if known is not None and known[1] == "working":
                run.mark(tensor, "activations")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def _has_no_room(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a tensor that is made of a shape alone is of floating point, or too large to be there."""
    if any(name in func.__name__ for name in _MADE_OF_NUMBERS):
        return False
    shape = next((item for item in args if isinstance(item, list | tuple)), ())
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    if dtype.is_floating_point:
        return True
    return math.prod(map(int, shape)) > (_EMPTY_UP_TO if "empty" in func.__name__ else _REAL_UP_TO)
