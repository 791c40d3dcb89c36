"""Uploading files of a directory to a repository of the hub."""

import glob
import pathlib
from collections.abc import Sequence
from typing import Any

from bitladder.errors import BitladderError
from bitladder.hub.download import reason


def upload(
    folder: pathlib.Path, groups: Sequence[tuple[str, Sequence[str]]], repo: str, *, private: bool = False
) -> str:
    """Upload files to a model repository, which is made if there is none; return its address.

    Each group is a commit message and file names relative to `folder`, with forward slashes; they go in this order.
    huggingface_hub does the transfer: files that the repository has already are skipped and parts that were sent are
    not sent again, so the same call goes on after an interruption. Other files of the repository stay.
    Raises BitladderError if the hub refuses, cannot be reached, or has a public repository where `private` is asked.
    """
    # Imported here: it takes a while, and --dry-run does not need it.
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(repo, private=private or None, exist_ok=True))
        info: Any = api.model_info(repo)
        if private and not info.private:
            raise BitladderError(
                f"{repo} is public already; make it private in its settings on the hub, or leave --private out"
            )
        for message, names in groups:
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                allow_patterns=[glob.escape(name) for name in names],
                commit_message=message,
            )
    except BitladderError:
        raise
    except Exception as error:  # whatever the network and the hub come up with; there is no common base class
        raise BitladderError(f"upload to {repo}: {reason(error)}; the same command goes on where it stopped") from error
    return address
