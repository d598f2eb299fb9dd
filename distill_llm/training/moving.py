"""Teachers that move with the student: after every optimiser step, and into and out of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distill_llm.core.errors import StorageError
from distill_llm.teachers.base import MovingTeacher, TensorTeacher

_FILE = "teachers.pt"


class MoveTeachers(TrainerCallback):
    """Moves those of ``teachers`` that move. Steps are done before a checkpoint of them is written."""

    def __init__(self, teachers: Mapping[str, TensorTeacher]):
        self._moving = {name: teacher for name, teacher in teachers.items() if isinstance(teacher, MovingTeacher)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for teacher in self._moving.values():
            teacher.after_step(kwargs["model"], state.global_step)

    def save(self, folder: Path) -> None:
        """Adds their state to a checkpoint; nothing where none moves."""
        if self._moving:
            torch.save({name: teacher.state() for name, teacher in self._moving.items()}, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Gives them the state of a checkpoint. Raises StorageError where it is not there."""
        if not self._moving:
            return
        try:
            states = torch.load(folder / _FILE, map_location="cpu", weights_only=True)
            for name, teacher in self._moving.items():
                teacher.restore(states[name])
        except (FileNotFoundError, KeyError) as error:
            raise StorageError(
                f"{folder}: this checkpoint lacks the state of the teachers {sorted(self._moving)} ({error}). It is "
                "from a training with other teachers: delete the folder of checkpoints and start again."
            ) from None
