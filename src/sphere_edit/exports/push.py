"""An export sent to the Hugging Face hub: checked before the work, private unless asked otherwise, and what is there replaced whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sphere_edit.errors import SphereEditError
from sphere_edit.exports.manifest import Manifest, read_manifest

_NO_MODEL = {".gitattributes", "README.md"}  # what a new repository may hold already


def check_push(name: str, public: bool) -> None:
    """Refuse a push that would fail or overwrite, before anything is exported.

    Raises:
        SphereEditError: no token, or one that the hub does not take; no such owner; a repository with something else in it, or a
            public one that was not asked for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    if name.count("/") != 1 or not all(name.split("/")):
        raise SphereEditError(f"--push takes owner/name, not '{name}'")
    with _plainly(name):
        api = _api()
        api.whoami()
        try:
            found = api.model_info(name)
        except RepositoryNotFoundError:
            return
        files = {file.rfilename for file in found.siblings or ()}
        if files - _NO_MODEL and Manifest.NAME not in files:
            raise SphereEditError(
                f"{name} on the hub holds something that is no export of sphere-edit; push to another name"
            )
        if not found.private and not public:
            raise SphereEditError(f"{name} on the hub is public; add --public if everybody may see this export")


def push(folder: Path, name: str, public: bool) -> str:
    """Send an export to the hub as a model, private unless ``public``; what an earlier push left there and this one lacks is removed.

    Returns:
        where it is now.

    Raises:
        SphereEditError: saying why it could not be sent; the folder stays.
    """
    manifest = read_manifest(folder)
    check_push(name, public)
    batch = "" if manifest.state is None else f", after batch {manifest.state.batch}"
    with _plainly(name, f"; {folder} is whole: hf upload {name} {folder} sends it"):
        api = _api()
        api.create_repo(name, private=not public, exist_ok=True)
        done = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=f"Edited model as {manifest.form}{batch}",
            delete_patterns="*",
        )
        return str(done.commit_url)


def _api() -> Any:
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        raise SphereEditError(
            "the hub takes nothing without a token: run hf auth login, or set HF_TOKEN to one that can write"
        )
    return HfApi(token=token)


@contextmanager
def _plainly(name: str, then: str = "") -> Iterator[None]:
    """What the hub or the way to it says, in one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise SphereEditError(f"HF_HUB_OFFLINE is set, so that nothing can be pushed to {name}{then}") from None
    except HFValidationError as error:
        raise SphereEditError(f"--push '{name}' is no name for the hub: {' '.join(str(error).split())[:200]}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status == 401:
            raise SphereEditError(
                f"the hub does not take this token; run hf auth login again, or set HF_TOKEN{then}"
            ) from None
        if status == 403:
            raise SphereEditError(f"this token may not write to {name}; use one that can{then}") from None
        raise SphereEditError(f"the hub refused {name}: {' '.join(str(error).split())[:300]}{then}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise SphereEditError(
            f"{name} could not be sent to the hub: {' '.join(str(error).split())[:300]}{then}"
        ) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise
        raise SphereEditError(f"the hub cannot be reached: {' '.join(str(error).split())[:300]}{then}") from None
