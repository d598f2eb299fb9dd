"""Shared by all tests: offline, one thread, tiny fresh models, and array shapes that are checked at every call."""

from __future__ import annotations

import ast
import importlib.util
import os
import pkgutil
import subprocess
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

import jaxtyping
import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill_llm.models.load import LoadedModel
    from distill_llm.pipeline.rationale_stage import Material
    from distill_llm.pipeline.run_folder import RunFolder
    from distill_llm.pipeline.student_stage import Plan
    from distill_llm.recipe.recipe import Recipe

torch.set_num_threads(1)

_SHAPE_CHECKED = tuple(
    f"distill_llm.{name}"
    for name in (
        "core.features",
        "core.layout",
        "core.signals",
        "core.sparse",
        "models.cheap_dropout",
        "models.cpu_training",
        "models.forward",
        "models.layers",
        "models.head",
        "models.picture",
        "models.vision",
        "models.peers",
        "models.exits",
        "models.importance",
        "losses",
        "objective",
        "data",
        "schemes",
    )
)
# Each module stands behind those whose names it writes in annotations; plug-ins follow their base by themselves.
_IN_ORDER = (
    ("distill_llm.core.features", ("Features", "Reading", "Side", "Shape")),
    ("distill_llm.core.layout", ()),
    ("distill_llm.core.signals", ("Signals", "LazySignals", "Batch")),
    ("distill_llm.core.sparse", ("SparseSignals",)),
    ("distill_llm.models.cheap_dropout", ()),
    ("distill_llm.models.cpu_training", ()),
    ("distill_llm.models.picture", ("Painter", "Picture")),
    ("distill_llm.models.vision", ()),
    ("distill_llm.models.forward", ("Passed", "Heads")),
    ("distill_llm.models.peers", ("Peers",)),
    ("distill_llm.models.layers", ()),
    ("distill_llm.models.head", ("OutputHead",)),
    ("distill_llm.models.exits", ()),
    ("distill_llm.models.importance", ()),
    ("distill_llm.losses.base", ()),
    ("distill_llm.losses.layers", ()),
    ("distill_llm.losses", ()),
    ("distill_llm.objective", ("Objective", "Term")),
    ("distill_llm.data.view", ("StudentView",)),
    ("distill_llm.data.rows", ("Row",)),
    ("distill_llm.data.cuts", ("TokenCuts",)),
    ("distill_llm.data.sampler", ()),
    ("distill_llm.data.collate", ("Collator",)),
    ("distill_llm.schemes.stages", ()),
    ("distill_llm.schemes.base", ()),
    ("distill_llm.schemes.step_by_step", ()),
    ("distill_llm.schemes", ()),
)


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs unless tests for one are asked for (``-m gpu``): all others compare with what a CPU computes."""
    chosen = str(config.getoption("markexpr"))
    if "gpu" not in chosen or "not gpu" in chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _check_shapes() -> None:
    """Imports the numeric modules with every annotated call checked by jaxtyping and beartype.

    The package imports what it only needs in annotations under TYPE_CHECKING, because loading a recipe needs no torch;
    a checker that does not find a name checks nothing. So each module is lent the names while it is executed, and
    loses them again: a name that it truly forgot to import must still be a NameError in the tests.
    """
    from distill_llm.core.example import Example, Target, TeacherAnswer
    from distill_llm.models.spec import PictureSpec, Prefixes, PrefixSide
    from distill_llm.tasks.base import Task

    names: dict[str, Any] = {
        "Tensor": torch.Tensor,
        "TensorTeacher": Any,
        "Scheme": Any,
        "device": torch.device,
    }  # isinstance knows no Protocol
    names |= {name: getattr(jaxtyping, name) for name in ("Float", "Int", "Bool")}
    names |= {kind.__name__: kind for kind in (Example, TeacherAnswer, PictureSpec, Prefixes, Task)} | {
        "HubConfig": dict[str, Any],
        "Target": Target,
        "PrefixSide": PrefixSide,
    }
    checked = set()
    with jaxtyping.install_import_hook(_SHAPE_CHECKED, "beartype.beartype"):
        for name, gives in _IN_ORDER:
            for module in [name, *_plug_ins(name)]:
                loaded = sys.modules[module] if module in checked else _import_with(module, names)
                checked.add(module)
                names.update({given: getattr(loaded, given) for given in gives})
    missed = {name for name in sys.modules if name.startswith(_SHAPE_CHECKED)} - checked - {"distill_llm.data"}
    assert not missed, f"add these modules to _IN_ORDER, or their shapes stay unchecked: {sorted(missed)}"


def _plug_ins(package: str) -> list[str]:
    if package.count(".") > 1 or package == "distill_llm.objective":
        return []
    return [f"{package}.{module.name}" for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]


def _import_with(name: str, lent: dict[str, Any]) -> types.ModuleType:
    """Imports ``name`` afresh, with ``lent`` among its globals until it is executed."""
    assert name not in sys.modules or hasattr(sys.modules[name], "__path__"), f"{name} was imported too early"
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module).update(lent)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    for key, value in lent.items():
        if vars(module).get(key) is value and key not in _defined_or_imported(module):
            delattr(module, key)
    parent, _, child = name.rpartition(".")
    setattr(sys.modules[parent], child, module)
    return module


def _defined_or_imported(module: types.ModuleType) -> set[str]:
    """Names that the module's own top level binds at run time."""
    found: set[str] = set()
    for node in ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
    return found


_check_shapes()

WORDS = (
    "predict explain reason : the answer is a b c d e f g h who pays more what costs 0 1 2 3 4 5 6 7 8 9 "
    "ann bob + - * = . , ? ( ) and so because then"
)
SHOP_WORDS = (
    "predict explain reason : so ann bob carl dora emil fay gus hana buys and . who pays more ? + = > < "
    + " ".join(map(str, range(41)))
)
"""Words that the generated task `shop` is written in, prefixes included."""
T5_SIZES: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 4,
    "feed_forward_proj": "relu",
    "dropout_rate": 0.0,
}
LLAMA_SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


PICTURE: dict[str, Any] = {"width": 96, "height": 33, "font": "fixed"}
VIT_SIZES: dict[str, Any] = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "patch_size": [11, 12],
    "num_channels": 1,
    "hidden_dropout_prob": 0.0,
}
WRITER_SIZES: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "trocr": {
        "d_model": 24,
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 32,
        "dropout": 0.0,
        "max_position_embeddings": 64,
    },
}


def vision_sizes(decoder: str = "gpt2", **sizes: Any) -> dict[str, Any]:
    """The config of a tiny model that reads pictures of 96 x 33 pixels."""
    written = {"model_type": decoder} | WRITER_SIZES[decoder] | sizes
    return {"model_type": "vision-encoder-decoder", "encoder": VIT_SIZES, "decoder": written}


def build_tiny(
    sizes: dict[str, Any], *, tokenizer: str = "words", seed: int = 0, text: str = WORDS, **keys: Any
) -> LoadedModel:
    """A fresh model in eval mode with a tokenizer trained on ``text``; ``seed`` draws the weights."""
    from distill_llm.models.load import build_student, load_tokenizer
    from distill_llm.models.spec import StudentSpec

    spec = StudentSpec.model_validate({"config": sizes, "tokenizer": {"kind": tokenizer, "vocab_size": 512}} | keys)
    torch.manual_seed(seed)
    student = build_student(spec, load_tokenizer(spec, [text]))
    student.model.eval()
    return student


@pytest.fixture
def tiny_t5() -> Callable[..., LoadedModel]:
    """Builds an encoder-decoder: ``tiny_t5(seed=1, tokenizer="bytes_bpe", text=..., dropout_rate=0.1)``."""

    def build(*, tokenizer: str = "words", seed: int = 0, text: str = WORDS, **sizes: Any) -> LoadedModel:
        return build_tiny(T5_SIZES | sizes, tokenizer=tokenizer, seed=seed, text=text)

    return build


@pytest.fixture
def tiny_llama() -> Callable[..., LoadedModel]:
    """Builds a decoder-only model: ``tiny_llama(seed=1, tokenizer="bytes_bpe", text=..., attention_dropout=0.1)``."""

    def build(*, tokenizer: str = "words", seed: int = 0, text: str = WORDS, **sizes: Any) -> LoadedModel:
        return build_tiny(LLAMA_SIZES | sizes, tokenizer=tokenizer, seed=seed, text=text)

    return build


@pytest.fixture
def tiny_vision() -> Callable[..., LoadedModel]:
    """Builds a model that reads pictures: ``tiny_vision(seed=1, decoder="bert", text=..., n_embd=24)``."""

    def build(*, decoder: str = "gpt2", seed: int = 0, text: str = WORDS, **sizes: Any) -> LoadedModel:
        return build_tiny(vision_sizes(decoder, **sizes), seed=seed, text=text, picture=PICTURE)

    return build


@pytest.fixture
def save_llava() -> Callable[..., tuple[Any, Any, Any]]:
    """Saves a fresh LLaVA, which reads pictures of 16 x 16 pixels in 4 patches, with its words and <image>; gives
    model, tokenizer and image processor."""

    def save(folder: Path, tokenizer: Any) -> tuple[Any, Any, Any]:
        from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig
        from transformers import LlavaForConditionalGeneration as Llava

        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        torch.manual_seed(2)
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        text = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=64, **sizes)
        vision = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=16, num_hidden_layers=2, **sizes)
        place = tokenizer.convert_tokens_to_ids("<image>")
        model = Llava(LlavaConfig(vision_config=vision, text_config=text, image_token_index=place)).eval()
        processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        for one in (model, tokenizer, processor):
            one.save_pretrained(folder)
        return model, tokenizer, processor

    return save


@pytest.fixture(params=["t5", "llama"])
def tiny_model(request: pytest.FixtureRequest) -> Callable[..., LoadedModel]:
    """The test runs twice: with ``tiny_t5`` and with ``tiny_llama``."""
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Every test starts from the same global seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a Python program in ``tmp_path``, in so many processes under torchrun; it must end well."""

    def run(
        *words: str, processes: int = 2, timeout: float = 240, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        done = subprocess.run(
            [sys.executable, *(several if processes else []), *words],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def planned() -> Callable[[Recipe], tuple[RunFolder, Material, Plan]]:
    """The first stage of a recipe, and the plan of its second."""
    from distill_llm.core.progress import SILENT
    from distill_llm.pipeline.rationale_stage import check, gather, read_material
    from distill_llm.pipeline.run_folder import claim
    from distill_llm.pipeline.student_stage import make_plan

    def plan(recipe: Recipe) -> tuple[RunFolder, Material, Plan]:
        run = claim(recipe)
        splits = check(recipe)
        gather(recipe, splits, run, SILENT)
        material = read_material(recipe, splits, run)
        assert material is not None
        return run, material, make_plan(recipe, material, run)

    return plan
