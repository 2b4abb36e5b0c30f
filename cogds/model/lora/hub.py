"""Folders put onto the Hugging Face hub: private unless told otherwise."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from cogds.errors import BUGS, UserError, brief


def check_repo(repo: str, public: bool, api: Any = None) -> None:
    """Raise UserError where a folder could not be pushed to `repo`, or would be seen by more than was asked for.

    api: an `HfApi`, or what stands in for it.
    """
    api = api or HfApi()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--push-to {repo} is no repository of the hub: give OWNER/NAME")
    try:
        who = api.whoami()["name"]
    except BUGS:
        raise
    except Exception as error:
        raise UserError(
            f"--push-to {repo}: the hub does not know who you are ({brief(error)}): log in with `hf auth login`"
        ) from None
    try:
        private = api.model_info(repo).private
    except RepositoryNotFoundError:
        return
    except BUGS:
        raise
    except Exception as error:
        raise UserError(f"--push-to {repo}: the hub was asked as {who} and does not answer ({brief(error)})") from None
    if not private and not public:
        raise UserError(f"--push-to {repo} is there already and everybody can see it: give another, or --public")


def listed(folder: Path) -> list[str]:
    """What a push would upload, for people: every file and its size."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"  {path.relative_to(folder)}  {path.stat().st_size / 1e6:.2f} MB" for path in files]


def push(folder: Path, repo: str, public: bool, api: Any = None) -> str:
    """Upload the folder into the repository, which is made where there is none; returns its address.

    Raises UserError where the hub refuses, or cannot be reached.
    """
    api = api or HfApi()
    try:
        made = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {folder.name}")
    except BUGS:
        raise
    except Exception as error:
        raise UserError(
            f"--push-to {repo}: the upload failed ({brief(error)}); {folder} is whole: upload it later with "
            f"`hf upload {repo} {folder}`"
        ) from None
    return str(made)
