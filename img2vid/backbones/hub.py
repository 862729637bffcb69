"""Fetching pretrained weights: cached ones at once, others over the network, and a quick clear no without one."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlparse

from img2vid.errors import BackboneError


class WeightsUnavailable(BackboneError):
    """Something that is neither cached nor to be had over the network; the message names every way out that applies."""


ONLINE = "run once with a network: the libraries' caches are used afterwards"
WEIGHTS_WAYS = (
    "--weights FILE: load them from a .safetensors or .pth file (in Python: weights=FILE)",
    "--random-weights: convert the architecture with random weights (in Python: random_weights=True)",
    "--backbone nano_clip: the small pretrained model that comes with img2vid, which needs no network",
    ONLINE,
)


@contextmanager
def fetching(what: str, ways_out: Sequence[str] = WEIGHTS_WAYS) -> Iterator[None]:
    """Run a library's own download; without a network use its cache only, instead of minutes of retries.

    Args:
        what: what is fetched, as the error names it: ``the pretrained weights of vit_base``.
        ways_out: what the user can do without it.

    Raises:
        WeightsUnavailable: it could not be had.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    logger = logging.getLogger("huggingface_hub")
    offline, level = constants.HF_HUB_OFFLINE, logger.level
    if not reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
        logger.setLevel(logging.ERROR)
    try:
        yield
    except HFValidationError as error:
        raise BackboneError(f"No repository can have such a name, so {what} cannot be fetched: {error}") from error
    except OSError as error:  # all of huggingface_hub's and urllib's errors about fetching are OSErrors
        raise WeightsUnavailable(unavailable(what, ways_out, error)) from error
    except RuntimeError as error:
        # open_clip reports failed downloads as RuntimeError; anything else is not about fetching
        if "download" not in str(error).lower():
            raise
        raise WeightsUnavailable(unavailable(what, ways_out, error)) from error
    finally:
        constants.HF_HUB_OFFLINE = offline
        logger.setLevel(level)


def reachable(endpoint: str) -> bool:
    """Whether the hub's host can be found at all; behind a proxy only trying tells."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlparse(endpoint).hostname, 443)
    except OSError:
        return False
    return True


def unavailable(what: str, ways_out: Sequence[str], error: Exception) -> str:
    reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    ways = "".join(f"\n  {way}" for way in ways_out)
    return f"Not in the local cache, and could not be downloaded ({reason}): {what}.\nWays out:{ways}"
