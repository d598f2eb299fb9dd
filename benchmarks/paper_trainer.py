"""The training of Hsieh et al. 2023 (arXiv:2305.02301) on a plain Hugging Face trainer: training.py's baseline.

Batches of a fixed number of shuffled examples; label rows and rationale rows each padded to the longest of the batch
and forwarded on their own; alpha * label + (1 - alpha) * rationale of the models' own mean losses; float32, or
bfloat16 where the recipe says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_callback import PrinterCallback

from distill_llm.data.rows import Row
from distill_llm.models.load import LoadedModel
from distill_llm.recipe.recipe import Recipe
from distill_llm.training.arguments import make_optimizer


class PaperTrainer(Seq2SeqTrainer):
    """Two forwards a step and the models' own mean losses, as the paper's code has it."""

    def __init__(self, *, label_weight: float, batches: list[list[int]] | None, **options: Any):
        super().__init__(**options)
        self._label_weight, self._batches = label_weight, batches

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        label, rationale = model(**inputs["label"]), model(**inputs["rationale"])
        loss = self._label_weight * label.loss + (1 - self._label_weight) * rationale.loss
        return (loss, {"label": label, "rationale": rationale}) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader[Any]:
        if self._batches is None:
            return super().get_train_dataloader()
        data: Any = self.train_dataset
        given = DataLoader(data, batch_sampler=self._batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(given)


class PaperCollator:
    """Label rows and rationale rows of the same examples, each padded to the longest of them."""

    def __init__(self, tokenizer: Any, model: Any):
        self._pad = DataCollatorForSeq2Seq(tokenizer, model=model)

    def __call__(self, examples: Sequence[dict[str, Row]]) -> dict[str, Any]:
        return {target: self._pad([self._features(one[target]) for one in examples]) for target in examples[0]}

    @staticmethod
    def _features(row: Row) -> dict[str, list[int]]:
        return {
            "input_ids": list(row.input_ids),
            "attention_mask": [1] * len(row.input_ids),
            "labels": list(row.label_ids),
        }


def pairs_of(rows: Sequence[Row]) -> dict[int, dict[str, Row]]:
    """Each example's label row and rationale row, by the example's place in the split."""
    pairs: dict[int, dict[str, Row]] = {}
    for row in rows:
        pairs.setdefault(row.example, {})[row.target] = row
    whole = all(set(pair) == {"label", "rationale"} for pair in pairs.values())
    assert whole, "the baseline takes examples with a label and a rationale: choose rationales.keep=[]"
    assert len(rows) == 2 * len(pairs), "the baseline takes one rationale an example"
    return pairs


def paper_trainer(
    student: LoadedModel,
    rows: Sequence[Row],
    recipe: Recipe,
    *,
    steps: int,
    seed: int,
    log_every: int,
    folder: Path,
    batches: Sequence[Sequence[int]] | None = None,
) -> PaperTrainer:
    """A trainer of ``student`` with the recipe's rates and sizes, where a step has half as many examples as rows.

    ``batches``: which examples each step sees, by their place in the split; None: shuffled.
    """
    spec = recipe.train
    pairs = pairs_of(rows)
    places = {example: place for place, example in enumerate(pairs)}
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=spec.rows_per_step // 2,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.schedule,
        warmup_steps=spec.warmup_steps,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        use_cpu=not torch.cuda.is_available(),
        bf16=spec.precision == "bfloat16",
        save_strategy="no",
        logging_steps=log_every,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
        log_level="error",
    )
    trainer = PaperTrainer(
        label_weight=_label_weight(recipe),
        batches=None if batches is None else [[places[example] for example in batch] for batch in batches],
        model=student.model,
        args=arguments,
        train_dataset=list(pairs.values()),
        data_collator=PaperCollator(student.tokenizer, student.model),
        processing_class=student.tokenizer,
        optimizers=(make_optimizer(student.model, spec), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _label_weight(recipe: Recipe) -> float:
    weights = {term.targets: term.weight for term in recipe.objective if term.teacher is None}
    label, rationale = weights[("label",)], weights[("rationale",)]
    assert isinstance(label, float), "the baseline has no schedules"
    assert isinstance(rationale, float), "the baseline has no schedules"
    assert abs(label + rationale - 1) < 1e-9, "the baseline is alpha * label + (1 - alpha) * rationale"
    return label
