"""The recipe's training and evaluation sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill_llm.core.component import Component
from distill_llm.core.example import Target

Optimizer = Literal["adamw", "adafactor"]
Packing = Literal["auto", "always", "never"]
Precision = Literal["auto", "float32", "bfloat16"]


class TrainSpec(Component):
    """One training. A step sees ``rows_per_step`` rows, however many devices and micro-batches share them."""

    learning_rate: float = Field(
        default=5e-5, gt=0, description="5e-5 is the paper's; a small fresh T5 with adafactor needs 2e-2"
    )
    tune: tuple[float, ...] = Field(
        default=(), description="learning rates to try for the student and every control; validation picks"
    )
    max_steps: int = Field(default=0, ge=0, description="optimiser steps; 0: given by `epochs`")
    epochs: float = Field(default=0.0, ge=0, description="passes over the rows; 0: given by `max_steps`")
    rows_per_step: int = Field(default=64, gt=0, description="rows (example and target) of one optimiser step")
    rows_per_batch: int = Field(default=64, gt=0, description="rows that fit one device at once")
    tokens_per_batch: int = Field(
        default=0,
        ge=0,
        description="tokens, inputs and targets with their padding, that fit one device at once, instead of "
        "`rows_per_batch`; 0: by rows",
    )
    chunk_tokens: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        default="auto",
        description="supervised tokens whose logits exist at once; auto: 128 MiB of them; 0: all, and those of the "
        "prompt and the padding too. The loss is the same but for rounding",
    )
    packing: Packing = Field(
        default="auto",
        description="how rows of a batch share a pass. Encoder-decoder: each distinct input once, targets beside those "
        "of about one length. Decoder-only: all rows in one, without padding (auto: where the attention gains by it). "
        "never: padded to the longest. The loss is the same but for rounding",
    )
    seed: Literal["recipe"] | Annotated[int, Field(ge=0)] = Field(
        default="recipe",
        description="of the initial weights, the order of the rows and the dropout; recipe: the recipe's own `seed`, "
        "which draws the data's splits and the teacher's texts too",
    )
    optimizer: Optimizer = "adamw"
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_input_tokens: int = Field(default=1024, gt=1)
    max_target_tokens: int = Field(default=256, gt=1)
    precision: Precision = Field(
        default="auto",
        description="auto: bfloat16 on a GPU that has it, and on a CPU that has it where the student is large enough "
        "to gain; float32 elsewhere",
    )
    gradient_checkpointing: bool = False
    validate_every: int = Field(default=0, ge=0, description="steps between validations; 0: ten times a training")
    patience: int = Field(default=0, ge=0, description="stop after so many validations without a gain; 0: never")
    keep_checkpoints: int = Field(default=1, ge=1, description="checkpoints kept for resuming, the best one besides")
    workers: int = Field(default=1, ge=1, description="trainings side by side, each in a process of one thread")
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    diagnostics: bool = Field(
        default=True,
        description="log tokens, agreement with the teacher, its entropy and the share of the gradient, by term",
    )

    @model_validator(mode="after")
    def _steps_add_up(self) -> TrainSpec:
        if bool(self.max_steps) == bool(self.epochs):
            raise ValueError("give either `max_steps` or `epochs`, not both or neither (0 is 'not given')")
        if not self.tokens_per_batch and self.rows_per_step % self.rows_per_batch:
            raise ValueError(
                f"rows_per_step ({self.rows_per_step}) must be a multiple of rows_per_batch ({self.rows_per_batch})"
            )
        return self


Control = Literal["labels_same_steps", "labels_same_compute"]


class EvaluateSpec(Component):
    """What is measured on the test split, and against what."""

    target: Target = Field(default="label", description="which target the student is asked for")
    by: Literal["generation", "likelihood"] = Field(
        default="generation",
        description="likelihood: of an example's choices the one whose text the student holds likeliest",
    )
    label_bias: dict[str, Literal["fit"] | Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default_factory=dict,
        description="nats added to the log-likelihood of a label; fit: chosen on validation, never on test",
    )
    batch_rows: int = Field(default=128, gt=0)
    max_new_tokens: int = Field(default=0, ge=0, description="0: train.max_target_tokens")
    controls: tuple[Control, ...] = Field(
        default=("labels_same_steps", "labels_same_compute"), description="trained beside the student by `run`"
    )
    from_scratch: bool = Field(
        default=False,
        description="train a student of the same sizes from fresh weights too, with the same objective and steps, and "
        "without the scheme: what its `model` was worth",
    )
    ablations: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="further students: a name, and the objective's terms that it keeps"
    )
    teacher: bool = Field(default=True, description="ask the rationales' teacher for the test split too, and score it")
    resamples: int = Field(default=10_000, ge=100, description="of the bootstrap")

    @model_validator(mode="after")
    def _likelihood_of_labels(self) -> EvaluateSpec:
        if self.by == "likelihood" and self.target != "label":
            raise ValueError(f"by: likelihood scores labels, but target is {self.target}. Set target: label")
        if self.label_bias and self.by != "likelihood":
            raise ValueError("label_bias is added to likelihoods of labels: set by: likelihood, or remove it")
        return self
