"""What `distill-llm plan` says against what a training takes: peak memory of the whole process, and time.

    python benchmarks/planner.py [--cases quickstart cqa lora words ...] [--steps 12] [--threads 1]

Each prediction and each training is a process of its own, one after the other. A training is that of
`distill-llm train`, of a few steps, with one validation at its end; measured is the most memory that the process ever
had (`ru_maxrss` on a CPU, `torch.cuda.max_memory_allocated` on a GPU), and the seconds of its steps. Models have random
weights, made on the spot; `cqa` needs the data of benchmarks/training.yaml, and is left out where it is not there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

CQA = Path("../shared/data/dss/cqa")
T5: dict[str, Any] = {
    "model_type": "t5",
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "relu",
    "dropout_rate": 0.0,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
WORDS = 32_768  # of a vocabulary where logits outweigh all else
LIMIT = 0.2


def cases(folder: Path) -> dict[str, dict[str, Any]]:
    """Recipes by name; models that they name are made first."""
    words = {"kind": "words", "vocab_size": 1024}
    small = {**T5, "d_model": 32, "d_ff": 48}
    big = make_model(folder / "t5-teacher", {**T5, "d_model": 96, "d_kv": 24, "d_ff": 192})
    base = make_model(folder / "llama-base", {**LLAMA, "hidden_size": 512, "intermediate_size": 1408})
    wide = {**LLAMA, "hidden_size": 256, "intermediate_size": 704, "vocab_size": WORDS}
    teacher = make_model(folder / "llama-wide", {**wide, "hidden_size": 512, "intermediate_size": 1408})
    soft = {"name": "soft", "loss": {"kind": "forward_kl"}, "targets": ["rationale"], "teacher": "big"}
    taught = {"teachers": {"big": {"kind": "frozen", "model": teacher}}, "objective": [*terms(), soft]}
    found = {
        "quickstart": recipe(
            student={"config": small, "tokenizer": f"{big}"},
            teachers={"big": {"kind": "frozen", "model": big}},
            objective=[*terms(), {**soft, "targets": ["label"]}],
            train={"optimizer": "adafactor", "learning_rate": 4e-2},
        ),
        "lora": recipe(student={"model": base, "lora": {"rank": 16}}),
        "words": recipe(student={"config": wide, "tokenizer": teacher}, **taught),
        "words, whole": recipe(student={"config": wide, "tokenizer": teacher}, train={"chunk_tokens": 0}, **taught),
        "words, bfloat16": recipe(
            student={"config": wide, "tokenizer": teacher}, train={"precision": "bfloat16"}, **taught
        ),
        "t5, 60M": recipe(
            student={
                "config": {**T5, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
                | {"vocab_size": 32_128, "dropout_rate": 0.1},
                "tokenizer": words,
            },
        ),
    }
    if CQA.is_dir():
        own = yaml.safe_load(Path("benchmarks/training.yaml").read_text(encoding="utf-8"))
        own["evaluate"]["batch_rows"] = 16
        found["cqa"] = own
        found["cqa, validated in batches of 128"] = {**own, "evaluate": {**own["evaluate"], "batch_rows": 128}}
    return found


def terms() -> list[dict[str, Any]]:
    return [{"name": name, "loss": {"kind": "cross_entropy"}, "targets": [name]} for name in ("label", "rationale")]


def recipe(*, train: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """Of the task `shop`, with its own rationales."""
    return {
        "task": {"kind": "shop", "train_size": 2000},
        "rationales": {"teacher": {"kind": "gold"}},
        "objective": terms(),
        "train": {
            "rows_per_step": 64,
            "rows_per_batch": 64,
            "max_input_tokens": 64,
            "max_target_tokens": 64,
            "precision": "float32",
            **(train or {}),
        },
        "evaluate": {"controls": [], "teacher": False, "batch_rows": 32, "max_new_tokens": 4},
        **sections,
    }


def make_model(place: Path, config: dict[str, Any]) -> str:
    """A folder with random weights and a tokenizer of words."""
    from distill_llm.core.quiet import quiet_libraries
    from distill_llm.models.load import build_student, load_tokenizer
    from distill_llm.models.spec import StudentSpec
    from distill_llm.tasks.shop import Shop

    quiet_libraries()
    spec = StudentSpec.model_validate({"config": config, "tokenizer": {"kind": "words", "vocab_size": 1024}})
    examples = Shop(train_size=2000).load(17).train
    texts = [text for example in examples for text in (example.input, example.rationale or "")]
    tokenizer = load_tokenizer(spec, ["predict: ", "explain: ", "reason: ", *texts])
    build_student(spec, tokenizer).model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def predict(path: str) -> dict[str, Any]:
    from distill_llm.core.quiet import quiet_libraries
    from distill_llm.pipeline.plan_time import step_seconds
    from distill_llm.pipeline.planner import plan_recipe
    from distill_llm.recipe.load import load_recipe

    quiet_libraries()
    plan = plan_recipe(load_recipe(path))
    stage = plan.memories.stages[-1]
    moments = [moment for moment in plan.memories.moments if moment.name.startswith("student")]
    peak = max(moments, key=lambda moment: moment.total)
    seconds = step_seconds(stage, plan.machine)
    return {"bytes": peak.total, "parts": dict(peak.parts), "moment": peak.name, "seconds": seconds}


def measure(path: str) -> dict[str, Any]:
    import resource

    import torch

    import distill_llm
    from distill_llm.core.files import read_json
    from distill_llm.recipe.load import load_recipe

    run = distill_llm.train(load_recipe(path))
    result = read_json(run.result("student"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {"bytes": peak, "seconds": result["seconds"] / result["steps"]}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--predict", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.predict or given.measure:
        print(json.dumps(predict(given.predict) if given.predict else measure(given.measure)))
        return
    with tempfile.TemporaryDirectory() as place:
        compare(given, Path(place))


def compare(given: argparse.Namespace, folder: Path) -> None:
    lines = []
    everything = cases(folder)
    for number, name in enumerate(given.cases or everything):
        path = folder / f"{number}.yaml"
        data: dict[str, Any] = everything[name] | {"name": f"case-{number}", "run_dir": str(folder / str(number))}
        data["train"] = data["train"] | {"max_steps": given.steps, "validate_every": given.steps}
        path.write_text(yaml.safe_dump(data), encoding="utf-8")
        said = in_a_process("--predict", path)
        subprocess.run(
            [sys.executable, "-m", "distill_llm", "-q", "generate-rationales", str(path)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found = in_a_process("--measure", path)
        lines.append(line(name, said, found))
        print(
            lines[-1], {part: round(size / 2**20) for part, size in said["parts"].items()}, file=sys.stderr, flush=True
        )
    print(
        "\n| case | peak at | predicted, MiB | measured, MiB | ratio | within 20% | s a step, predicted | measured |"
        "\n|---|---|---:|---:|---:|---|---:|---:|"
    )
    print("\n".join(lines))


def line(name: str, said: dict[str, Any], found: dict[str, Any]) -> str:
    ratio = said["bytes"] / found["bytes"]
    inside = "yes" if abs(ratio - 1) <= LIMIT else "no"
    sizes = f"{said['bytes'] / 2**20:,.0f} | {found['bytes'] / 2**20:,.0f} | {ratio:.2f} | {inside}"
    return f"| {name} | {said['moment']} | {sizes} | {said['seconds']:.3g} | {found['seconds']:.3g} |"


def in_a_process(option: str, path: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, option, str(path)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
