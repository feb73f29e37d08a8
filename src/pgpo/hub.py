"""Whether the hub has a model, asked once: the libraries ask for half a minute, and print each attempt."""

from __future__ import annotations

import re

from pgpo.errors import UserError, reason

_SECONDS = 10.0  # ours: a hub that has not answered by then counts as out of reach
_INSTEAD = "give a folder with config, weights and tokenizer"


def is_hub_id(text: str) -> bool:
    """Whether the text may name a model on the hub: `name` or `owner/name`."""
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", text) is not None


def require_model(name: str, revision: str | None = None) -> None:
    """Raises UserError if neither the cache nor the hub has a model of this name."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    file = "config.json"
    if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"the model {name!r} is not in the hub's cache, and HF_HUB_OFFLINE is set; {_INSTEAD}.")
    try:
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=_SECONDS)
    except EntryNotFoundError:  # as of an adapter; who loads it knows
        return
    except GatedRepoError as error:
        raise UserError(
            f"the model {name!r} is gated: ask for access on its page, and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"the model {name!r} has no revision {revision!r}; choose another.") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no model {name!r}, or it is private; check the name, or log in with `hf auth login`."
        ) from error
    except Exception as error:
        raise UserError(
            f"the hub cannot be asked for the model {name!r} ({type(error).__name__}: {reason(error)}); {_INSTEAD}, or "
            "check the connection."
        ) from error
