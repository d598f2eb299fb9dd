"""What happens beside the steps: a bar, a clock that survives a resume, and a clean stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distill_llm.core.files import read_json, write_json
from distill_llm.core.processes import summed
from distill_llm.core.progress import Progress


class ProgressBar(TrainerCallback):
    def __init__(self, progress: Progress, name: str):
        self._progress, self._name, self._note, self._drawn = progress, name, "", 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress.advance(self._name, state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        if now - self._drawn > 0.2 or state.global_step >= state.max_steps:
            self._drawn = now
            self._progress.advance(self._name, state.global_step, state.max_steps, self._note)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        accuracy = kwargs.get("metrics", {}).get("eval_accuracy")
        if accuracy is not None:
            self._note = f"validation {accuracy:.1%}"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress.advance(self._name, state.global_step, state.max_steps, self._note)


class Clock(TrainerCallback):
    """Seconds spent training, summed over interruptions, kept in a file beside the checkpoints."""

    def __init__(self, path: Path):
        self._path = path
        self._before = float(read_json(path)["seconds"]) if path.exists() else 0.0
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_json(self._path, {"seconds": self.seconds})


class StopCleanly(TrainerCallback):
    """On the first interrupt or termination signal: finish the step, save a checkpoint, stop. On the second: stop now.

    ``also`` is asked after each step, and stops the training just so.
    """

    def __init__(self, also: Callable[[], bool] = lambda: False) -> None:
        self.asked, self._also = False, also
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopCleanly:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # All ranks stop at the same step, or one would wait for the others for ever.
        if summed(int(self._also() or self.asked))[0]:
            self.asked = True
            control.should_save = True
            control.should_training_stop = True
