"""Whether the Hugging Face Hub answers at all, found out soon."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

PROBE_SECONDS = 10


def why_unreachable(ask: Callable[[], object]) -> str | None:
    """Why ``ask``, a request to the Hub, got no answer; None where it got one.

    The libraries alone retry each file for half a minute before they say so, even for what is in the cache. An answer
    that is an error (HfHubHTTPError) is raised.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # httpx's errors or those of httpx2, by the version of the library
    unreachable = cast("tuple[type[Exception], ...]", (OSError, *HfHubHTTPError.__bases__))
    try:
        ask()
    except HfHubHTTPError:
        raise
    except unreachable as error:
        return type(error).__name__
    return None
