"""``python -m distill_llm``, for torchrun."""

from distill_llm.cli.main import main

main()
