"""Output files of the offline tools: there when the command has succeeded, absent (or as before) otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from walbd.errors import NotFound, UsageError
from walbd.fs import FileSystem, TempFile


@contextmanager
def output_file(fs: FileSystem, path: Path) -> Iterator[TempFile]:
    """Give a new file that gets its name, and replaces an old file, only when the block ends well."""
    if path.exists() and not path.is_file():
        raise UsageError(
            "the output is not a regular file", hint="write to a file and copy it from there", path=str(path)
        )
    if not path.parent.is_dir():
        raise NotFound("no such directory", path=str(path.parent))
    with fs.temp_file(path.parent) as file:
        yield file
        file.commit(path)


OUT = click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), required=True, help="The file to make."
)
COMPRESS = click.option(
    "--compress",
    metavar="KIND[:LEVEL]",
    default="zstd",
    show_default=True,
    help="How to store data: none, snappy, gzip, lzma, lz4 or zstd, with a level where it has any.",
)
