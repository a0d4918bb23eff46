"""Which files a repository holds, by the protocols of the Hugging Face hub and of ModelScope."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from sagewan.checkpoint.folder import PARTS
from sagewan.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    import httpx

HF = "hf"
MODELSCOPE = "modelscope"
_HF_ENDPOINT = "https://huggingface.co"
_MODELSCOPE_ENDPOINT = "https://www.modelscope.cn"
# What a diffusers folder is read from; pictures, notes and weights in other formats stay there.
_FOLDERS = (*PARTS, "scheduler")
_SUFFIXES = (".json", ".safetensors", ".txt", ".model")
_INDEX = "model_index.json"


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file to fetch: ``path`` in the repository, ``size`` in bytes, and the digest it must
    have, ``sha256`` or git's ``blob`` (a SHA-1 over the size and the bytes)."""

    path: str
    size: int
    url: str
    sha256: str | None = None
    blob: str | None = None


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A place that models are fetched from: its protocol and its address."""

    protocol: str
    endpoint: str

    @classmethod
    def parse(cls, text: str) -> "Hub":
        """``hf`` (whose address ``HF_ENDPOINT`` may change), ``modelscope``, or the address of a
        mirror that speaks the protocol of the former."""
        if text == HF:
            return cls(protocol=HF, endpoint=os.environ.get("HF_ENDPOINT") or _HF_ENDPOINT)
        if text == MODELSCOPE:
            return cls(protocol=MODELSCOPE, endpoint=_MODELSCOPE_ENDPOINT)
        if text.startswith(("https://", "http://")):
            return cls(protocol=HF, endpoint=text)
        raise RequestError(f"from={text}: choose hf, modelscope, or the https:// of a mirror of hf")

    @property
    def headers(self) -> dict[str, str]:
        """The user's token, for the hub alone and never for a mirror."""
        token = os.environ.get("HF_TOKEN")
        if token and self.protocol == HF and self.endpoint == _HF_ENDPOINT:
            return {"Authorization": f"Bearer {token}"}
        return {}

    def files(self, client: "httpx.Client", repository: str) -> list[RemoteFile]:
        """The files of a diffusers folder, its index last: without it no model is seen there.

        Raises CheckpointError if the answer is not what the protocol says.
        """
        listed = self._listed(client, repository)
        wanted = sorted((file for file in listed if _is_wanted(file.path)), key=_index_last)
        if not wanted or wanted[-1].path != _INDEX:
            raise CheckpointError(
                f"{self.endpoint}: {repository} has no {_INDEX}, so it is no diffusers model: "
                "choose another source"
            )
        return wanted

    def _listed(self, client: "httpx.Client", repository: str) -> list[RemoteFile]:
        reader = _modelscope_files if self.protocol == MODELSCOPE else _hub_files
        try:
            return list(reader(client, self.endpoint.rstrip("/"), repository))
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.endpoint} answered with something that is no list of files: "
                "choose another source"
            ) from error


def _hub_files(client: "httpx.Client", endpoint: str, repository: str) -> Iterator[RemoteFile]:
    url: str | None = f"{endpoint}/api/models/{quote(repository)}/tree/main?recursive=true"
    while url:
        answer = fetched(client, url)
        for item in answer.json():
            if item["type"] == "file":
                lfs: Mapping[str, Any] = item.get("lfs") or {}
                yield RemoteFile(
                    path=str(item["path"]),
                    size=int(lfs.get("size", item["size"])),
                    url=f"{endpoint}/{quote(repository)}/resolve/main/{quote(item['path'])}",
                    sha256=lfs.get("oid"),
                    blob=None if lfs else item["oid"],
                )
        url = answer.links.get("next", {}).get("url")


def _modelscope_files(
    client: "httpx.Client", endpoint: str, repository: str
) -> Iterator[RemoteFile]:
    base = f"{endpoint}/api/v1/models/{quote(repository)}/repo"
    answer = fetched(client, f"{base}/files?Revision=master&Recursive=true")
    for item in answer.json()["Data"]["Files"]:
        if item["Type"] == "blob":
            yield RemoteFile(
                path=str(item["Path"]),
                size=int(item["Size"]),
                url=f"{base}?Revision=master&FilePath={quote(item['Path'], safe='')}",
                sha256=item["Sha256"],
            )


def fetched(client: "httpx.Client", url: str) -> "httpx.Response":
    """The answer to a small request; CheckpointError, one sentence, if there is none."""
    import httpx

    try:
        answer = client.get(url)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CheckpointError(
            f"{url} can't be reached ({error or type(error).__name__}): check the network and "
            "HF_ENDPOINT, or choose another source with --from"
        ) from error
    refuse_status(answer.status_code, url)
    return answer


def refuse_status(status: int, url: str) -> None:
    """CheckpointError for an answer that is none, with what to do."""
    if status in (401, 403):
        raise CheckpointError(
            f"{url} asks for an account ({status}): set HF_TOKEN, or choose another source"
        )
    if status == 404:
        raise CheckpointError(f"{url} is not there (404): choose another source with --from")
    if status >= 400:
        raise CheckpointError(f"{url} failed ({status}): try again later, or another source")


def _is_wanted(path: str) -> bool:
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or PurePosixPath(path).is_absolute() or "\\" in path:
        return False
    if len(parts) == 1:
        return path == _INDEX
    return parts[0] in _FOLDERS and len(parts) == 2 and path.endswith(_SUFFIXES)


def _index_last(file: RemoteFile) -> tuple[bool, str]:
    return file.path == _INDEX, file.path
