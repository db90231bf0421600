"""Large texts of notebooks, each in a file that is named by its content.

They are in one folder, which all notebooks beside it share: a run over one context has it once.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections import OrderedDict
from pathlib import Path

from kernel_env.errors import NotebookError

__all__ = ["FOLDER", "LARGE", "fetch", "is_reference", "put", "write_whole"]

FOLDER = "kernel_env_data"
LARGE = 2**16
"""Characters from which on a text has a file of its own."""

_NAME = re.compile(rf"{FOLDER}/([0-9a-f]{{64}})\.txt")
_REMEMBERED = 64
# Of a text that was written: the hash that Python keeps with it → its name. A digest takes 0.4 s for 100 MB.
_names: OrderedDict[tuple[int, int, str], str] = OrderedDict()


def put(text: str, beside: Path) -> dict[str, str]:
    """Have `text` in the folder beside a notebook's path; returns what stands in its place.

    Raises:
        OSError: it cannot be written.
    """
    folder = beside.parent / FOLDER
    key = (hash(text), len(text), str(folder))
    name = _names.get(key)
    if name is None or not (beside.parent / name).exists():
        data = text.encode("utf-8", "surrogatepass")
        name = f"{FOLDER}/{hashlib.sha256(data).hexdigest()}.txt"
        folder.mkdir(exist_ok=True)
        file = beside.parent / name
        if not file.exists() or file.stat().st_size != len(data):
            write_whole(file, data)
        _names[key] = name
        if len(_names) > _REMEMBERED:
            _names.popitem(last=False)
    return {"file": name}


def is_reference(value: object) -> bool:
    """Whether this stands in the place of a text."""
    return isinstance(value, dict) and value.keys() == {"file"} and isinstance(value["file"], str)


def fetch(reference: dict[str, str], beside: Path) -> str:
    """The text that a reference in a notebook at this path stands for.

    Raises:
        NotebookError: the file is not there, or is not what was written.
    """
    name = reference["file"]
    match = _NAME.fullmatch(name)
    if match is None:
        raise NotebookError(f"{str(beside)!r} refers to {name!r}, which is no file of {FOLDER}/")
    file = beside.parent / name
    try:
        data = file.read_bytes()
    except OSError as error:
        raise NotebookError(
            f"{str(beside)!r} needs the file {str(file)!r}: {error.strerror}; "
            f"move {FOLDER}/ along with the notebooks"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != match[1]:
        raise NotebookError(
            f"{str(file)!r} was altered: its SHA-256 is {digest}, and its name says {match[1]}"
        )
    return data.decode("utf-8", "surrogatepass")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, replacing an older one.

    Raises:
        OSError: it cannot be written; the older one is as it was.
    """
    written = path.with_name(f".{uuid.uuid4().hex}")
    try:
        with open(written, "xb") as file:
            file.write(data)
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)
