"""Hub ids: ``organisation/name``, fetched (once) by ``huggingface_hub``."""

from __future__ import annotations

import re

from etils import epath

from ...errors import InputError

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
# Weights, configurations, tokenizers, chat templates; no code.
_WANTED = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
# Of models that have no safetensors; what training left beside them is not fetched.
_TORCH = ("pytorch_model*.bin",)


def is_hub_id(text: str) -> bool:
    """Whether ``text`` could be a hub id (``organisation/name``, then perhaps ``@revision``)."""
    return _ID.fullmatch(text) is not None


def fetch(hub_id: str, field: str = "model") -> epath.Path:
    """The local directory with a published model's files; those that are there are not fetched.

    Args:
        hub_id: ``organisation/name`` or ``organisation/name@revision``.
        field: what messages call it.

    Raises:
        InputError: no such model, no right to read it, no network, or no ``huggingface_hub``.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise InputError(
            f"{field}={hub_id!r} is not a path that exists here; to fetch it from the hub, install "
            "the extra: pip install 'jaxalope[hf]'"
        ) from None
    repository, revision = _ID.fullmatch(hub_id).groups()

    def snapshot(patterns):
        return epath.Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=list(patterns)
            )
        )

    try:
        directory = snapshot(_WANTED)
        return directory if any(directory.glob("*.safetensors")) else snapshot(_TORCH)
    except errors.GatedRepoError as error:
        raise InputError(
            f"{field}={hub_id!r} asks for its terms to be accepted on its page, and for a login: "
            "hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{field}={hub_id!r} is neither a path that exists here nor a model of the hub that "
            "you may read; check the spelling, or log in: hf auth login"
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{field}={hub_id!r} is no path that exists here, and the hub could not be asked "
            f"({reason}); fetch it where there is a network (hf download {repository} --local-dir "
            "model) and give that directory"
        ) from error
