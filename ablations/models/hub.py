"""Single files of the Hugging Face hub, those that are here already without asking anybody."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub

from ablations.models.weight_files import ModelError


def hub_file(hub_id: str, filename: str, cache: Path | None, name: str) -> Path:
    """A file of a repository (``OWNER/NAME[@REVISION]``), fetched if it is not in the cache.

    Raises:
        ModelError: it is nowhere, or could run code when it is opened.
    """
    if not filename.endswith((".safetensors", ".json")):
        raise ModelError(
            f"the hub keeps the weights of {name} as {filename}, and only safetensors files are read: "
            "convert them and give WEIGHTS=file.safetensors"
        )
    repository, _, revision = hub_id.partition("@")
    problem: Exception | None = None
    for local in (True, False):  # what is already here first: no request, and the same answer offline
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    repository, filename, revision=revision or None, cache_dir=cache, local_files_only=local
                )
            )
        except Exception as error:  # noqa: BLE001  anything a network can do; the reason is passed on
            problem = error
    what = "the weights" if filename.endswith(".safetensors") else filename
    raise ModelError(
        f"{what} of {name} cannot be fetched from the hub ({repository}: {type(problem).__name__}): "
        "connect to the network, or give WEIGHTS=file.safetensors, or WEIGHTS=random"
    ) from problem
