"""What the cards of data sets and models are written with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

HOME = "https://github.com/distill-llm/distill-llm"
CITATION = """\
## Citation

The method is that of Hsieh et al. (2023), [arXiv:2305.02301](https://arxiv.org/abs/2305.02301):

```bibtex
@inproceedings{hsieh2023distilling,
  title     = {Distilling Step-by-Step! Outperforming Larger Language Models with Less Training Data and Smaller Model Sizes},
  author    = {Hsieh, Cheng-Yu and Li, Chun-Liang and Yeh, Chih-Kuan and Nakhost, Hootan and Fujii, Yasuhisa and
               Ratner, Alexander and Krishna, Ranjay and Lee, Chen-Yu and Pfister, Tomas},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2023},
  year      = {2023},
  eprint    = {2305.02301},
  archivePrefix = {arXiv}
}
```"""  # noqa: E501


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """A Markdown table; with ``numbers``, all columns but the first are aligned to the right."""
    rule = ["---", *("---:" if numbers else "---" for _ in head[1:])]
    cells = [[_cell(cell) for cell in row] for row in (head, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`"


def count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def join(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)
