"""What licences say of training on a model's output, and their names on the Hub: a short list, no legal advice."""

from __future__ import annotations

import re

# Of the Hub's list (https://huggingface.co/docs/hub/repositories-licenses), what data and models mostly have.
_HUB_LICENCES = re.compile(
    r"apache-2\.0|mit|afl-3\.0|artistic-2\.0|bsd|bsd-[23]-clause|mpl-2\.0|unlicense|(gpl|lgpl|agpl)-3\.0|gpl|gpl-2\.0|lgpl"
    r"|cc|cc0-1\.0|cc-by-(2\.0|2\.5|3\.0|4\.0)|cc-by-sa-[34]\.0|cc-by-nc-[234]\.0|cc-by-nc-sa-[234]\.0|cc-by-nd-4\.0"
    r"|cc-by-nc-nd-[34]\.0|cdla-sharing-1\.0|cdla-permissive-[12]\.0|c-uda|gfdl|odc-by|odbl|pddl"
    r"|openrail|bigscience-openrail-m|bigscience-bloom-rail-1\.0|llama2|llama3(\.[123])?|gemma|other|unknown"
)
_UNKNOWN = ("", "unknown", "other")
_NO_COMMERCE = re.compile(r"\bnc\b|non-?commercial|research-only|\bmrl\b|qwen-research")

# Found in the licence, or in the teacher's name where no licence is known; the first that fits counts.
_RESTRICTIONS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        _NO_COMMERCE,
        "The teacher's licence allows no commercial use. That may hold for models trained on what it wrote.",
    ),
    (
        re.compile(r"openai(?!-gpt-oss)|^gpt-[345]|chatgpt|^o[134]\b|davinci"),
        "OpenAI's terms do not allow its output to be used to develop models that compete with OpenAI.",
    ),
    (
        re.compile(r"anthropic|claude"),
        "Anthropic's terms do not allow competing models to be trained on its output without its permission.",
    ),
    (
        re.compile(r"gemini|google-(api|terms|ai-studio)"),
        "Google's terms for the Gemini API do not allow it to be used to develop models that compete with it.",
    ),
    (
        re.compile(r"llama-?[23](?![.\d])"),
        "The licences of Llama 2 and Llama 3 do not allow output to be used to improve models other than Llama.",
    ),
    (
        re.compile(r"llama-?(3\.\d|[4-9])"),
        "The licence of Llama 3.1 and later asks that a published model that was trained on Llama's output has a name "
        'that begins with "Llama", and that "Built with Llama" is shown.',
    ),
    (
        re.compile(r"gemma"),
        "Gemma's terms count a model that learned from Gemma's output as a derivative of Gemma: their restrictions "
        "on use go with it.",
    ),
    (
        re.compile(r"qwen-licen[cs]e|tongyi-qianwen"),
        "The Qwen licence sets conditions for models that are trained on Qwen's output.",
    ),
)


def teacher_restriction(teacher: str, licence: str) -> str | None:
    """One plain sentence where the licence of what ``teacher`` writes restricts training on it, or is not known."""
    known = _slug(licence) not in _UNKNOWN
    words = _slug(licence if known else teacher)
    for expression, sentence in _RESTRICTIONS:
        if expression.search(words):
            return sentence
    if known:
        return None
    return "Nobody has said under which licence the teacher's output may be used, or whether it may be trained on."


def data_restriction(licence: str) -> str | None:
    """One plain sentence where the licence of the task's data restricts its use, or is not known."""
    if _slug(licence) in _UNKNOWN:
        return "The licence of the task's data is not known."
    if _NO_COMMERCE.search(_slug(licence)):
        return f"The licence of the task's data ({licence}) allows no commercial use."
    return None


def hub_licence(licence: str) -> dict[str, str]:
    """``licence`` as the front matter of a card names it: one of the Hub's names, or ``other`` with its own."""
    name = _slug(licence) or "unknown"
    return {"license": name} if _HUB_LICENCES.fullmatch(name) else {"license": "other", "license_name": name}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
