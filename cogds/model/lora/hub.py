"""Upload of folders to the Hugging Face hub. Repositories are private by default."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from cogds.errors import BUGS, UserError, brief
from cogds.formatting import gigabytes


def check_repository(repo: str, public: bool, api: Any = None) -> None:
    """Raise UserError if a folder cannot be uploaded to `repo`, or if it would be public against the user's wish.

    api: an `HfApi`, or a stand-in for tests.
    """
    api = api or HfApi()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--push-to {repo}: not a hub repository. Pass OWNER/NAME.")
    try:
        user = api.whoami()["name"]
    except BUGS:
        raise
    except Exception as error:
        raise UserError(
            f"--push-to {repo}: not logged in to the hub ({brief(error)}). Log in with `hf auth login`."
        ) from None
    try:
        private = api.model_info(repo).private
    except RepositoryNotFoundError:
        return
    except BUGS:
        raise
    except Exception as error:
        raise UserError(
            f"--push-to {repo}: the hub cannot be queried as {user} ({brief(error)}). Check the network and try again."
        ) from None
    if not private and not public:
        raise UserError(
            f"--push-to {repo}: the repository exists and is public. Use another one, or allow it with --public."
        )


def list_files(folder: Path) -> list[str]:
    """Return a line with name and size for every file in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"  {path.relative_to(folder)}  {gigabytes(path.stat().st_size)}" for path in files]


def upload_folder(folder: Path, repo: str, public: bool, api: Any = None) -> str:
    """Upload the folder, create the repository if needed, and return its address.

    Raises UserError if the upload fails.
    """
    api = api or HfApi()
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {folder.name}")
    except BUGS:
        raise
    except Exception as error:
        raise UserError(
            f"--push-to {repo}: the upload failed ({brief(error)}). {folder} is complete. Upload it later with "
            f"`hf upload {repo} {folder}`."
        ) from None
    return str(address)
