"""Pictures in a bucket, for `segment --cluster`: listed and read where they are, through Arrow's file systems.

A URL is one of Arrow's: s3://bucket/folder, gs://bucket/folder, hdfs://..., file:///folder; options such as
`?region=eu-west-1` or `?endpoint_override=host:port` go into its query. Keys come from where the provider's own tools
take them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from service.errors import first_line
from service.folders import Found, entry_error, is_picture_name


class State(NamedTuple):
    """Size in bytes, and time of the last change in nanoseconds, as in os.stat_result."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True)
class BucketFile:
    """A picture in a bucket, as pathlib.Path is one in a folder. `root` is the URL that it was found under."""

    root: str
    path: str
    state: State

    def __str__(self) -> str:
        return f"{self.root.partition('://')[0]}://{self.path}"

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    def stat(self) -> State:
        """As it was when it was found."""
        return self.state

    def absolute(self) -> "BucketFile":
        return self

    @contextmanager
    def open(self, mode: str) -> Iterator[IO[bytes]]:
        """For reading bytes, whatever the mode. Raises OSError."""
        with _file_system(self.root)[0].open_input_stream(self.path) as stream:
            yield stream


@cache
def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it. Raises OSError and ValueError where there is none."""
    from pyarrow.fs import FileSystem

    return FileSystem.from_uri(url)


def find_in_buckets(urls: Sequence[str], recursive: bool) -> tuple[list[Found], list[dict[str, str]]]:
    """As folders.find_pictures, for URLs of folders and of files."""
    found: dict[str, Found] = {}
    errors = []
    for url in urls:
        try:
            inside = list(_pictures_at(url, recursive))
        except (OSError, ValueError) as error:
            errors.append(
                entry_error(_without_keys(url), "unreadable", f"the bucket cannot be read: {first_line(error)}")
            )
            continue
        if not inside:
            hint = "" if recursive else "; --recursive looks in its subfolders too"
            errors.append(entry_error(_without_keys(url), "no_pictures", f"there are no pictures in this folder{hint}"))
        for picture in inside:
            found.setdefault(str(picture.file), picture)
    return list(found.values()), errors


def _without_keys(url: str) -> str:
    """The URL for others to read: keys may stand in it before the bucket's name."""
    scheme, _, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"


def _pictures_at(url: str, recursive: bool) -> Iterator[Found]:
    from pyarrow.fs import FileSelector, FileType

    files, top = _file_system(url)
    given = files.get_file_info(top)
    if given.type == FileType.File:
        yield Found(BucketFile(url, top, State(given.size, given.mtime_ns)))
        return
    for info in sorted(files.get_file_info(FileSelector(top, recursive=recursive)), key=lambda info: info.path):
        below = PurePosixPath(info.path).relative_to(top)
        is_hidden = any(part.startswith(".") for part in below.parts)
        if info.type == FileType.File and is_picture_name(below) and not is_hidden:
            yield Found(BucketFile(url, info.path, State(info.size, info.mtime_ns)), below.parent)
