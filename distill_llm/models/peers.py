"""Several models in one, for a training in which each learns beside the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_llm.core.errors import ConfigError, StorageError

R = TypeVar("R")
_FILE = "peers.safetensors"


class Peers(nn.Module):
    """Models of one family and one vocabulary of ``width`` words, by name; the first gives device and config.

    Wrappers that reduce gradients over processes, or fetch weights from them, act around ``forward``: so all that the
    peers do in a step has to be done within one call of it, whatever that is.
    """

    def __init__(self, peers: Mapping[str, nn.Module], width: int):
        super().__init__()
        self.names = tuple(peers)
        self.peers = nn.ModuleList(peers.values())
        self.width = width

    def forward(self, run: Callable[[Peers], R]) -> R:
        """What ``run`` makes of them."""
        return run(self)

    @property
    def config(self) -> Any:
        return self._first.config

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def _first(self) -> Any:
        return self.peers[0]

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        for peer in self.peers:
            peer.gradient_checkpointing_enable(**options)  # pyright: ignore[reportCallIssue]

    def save_learned(self, folder: Path) -> None:
        """Adds all weights that learn to a checkpoint."""
        save_file({name: weight.detach().contiguous() for name, weight in self._learned().items()}, folder / _FILE)

    def load_learned(self, folder: Path) -> None:
        """Goes back to a checkpoint. Raises StorageError where it is that of other peers."""
        try:
            saved, own = load_file(folder / _FILE), self._learned()
            if saved.keys() != own.keys():
                raise KeyError(sorted(saved.keys() ^ own.keys())[0])
            with torch.no_grad():
                for name, weight in own.items():
                    weight.copy_(saved[name])
        except (FileNotFoundError, KeyError, RuntimeError) as error:
            raise StorageError(
                f"{folder / _FILE}: this checkpoint lacks the weights of the peers {list(self.names)} ({error}). It is "
                "from another training: delete the folder of checkpoints and start again."
            ) from None

    def _learned(self) -> dict[str, Tensor]:
        """Weights that models share among their parts are named once."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}


def members_of(model: Any) -> list[Any]:
    """The peers where ``model`` is made of several, or itself."""
    return list(model.peers) if isinstance(model, Peers) else [model]


def must_differ(peers: Peers) -> None:
    """Raises ConfigError where two peers are one model twice: they would agree in every step, and learn nothing.

    Dropout would tell two of the same weights apart.
    """
    for number, one in enumerate(peers.peers):
        for other_number, other in enumerate(list(peers.peers)[:number]):
            if _same_weights(one, other) and not _has_dropout(one):
                raise ConfigError(
                    f"scheme.peers: {peers.names[other_number]} and {peers.names[number]} start from the same weights, "
                    "and have no dropout: they would stay one model twice. Give one of them another `model`, or a "
                    "fresh `config`, or the student a `lora`."
                )


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    if mine.keys() != theirs.keys():
        return False
    return all(mine[name].shape == theirs[name].shape and torch.equal(mine[name], theirs[name]) for name in mine)


def _has_dropout(model: Any) -> bool:
    if any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules()):
        return True
    settings = model.config.to_dict().items()
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in settings)
