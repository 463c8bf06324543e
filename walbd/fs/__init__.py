"""Durable writes, direct IO and failpoints: the only door to the disk."""

from walbd.fs.disk import TMP_PREFIX, Buf, File, FileSystem, OsFileSystem, TempFile, physical_block_size

__all__ = ["TMP_PREFIX", "Buf", "File", "FileSystem", "OsFileSystem", "TempFile", "physical_block_size"]
