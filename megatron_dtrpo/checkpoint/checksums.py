"""The checksums that torch.save writes and torch.load does not compare.

torch.save writes a zip archive with a CRC32 of each part. A ``.distcp`` file holds one archive for each piece of a
tensor, whoever wrote it: checkpoints of earlier versions and of Megatron-LM are checked too.
"""

from __future__ import annotations

import zipfile
from typing import IO

_CHUNK = 1 << 20  # bytes read at a time
DIFFERS = "its checksum says that it is not as it was written"


def is_as_written(stream: IO[bytes]) -> bool:
    """Whether all parts of a seekable archive have their checksums. True for what torch.save wrote without any
    (`torch.serialization.set_crc32_options`), and for what is no archive, which is for torch.load to judge.

    Raises:
        OSError: if the stream cannot be read.
    """
    try:
        archive = zipfile.ZipFile(stream)
    except zipfile.BadZipFile:
        return True
    for part in archive.infolist():
        if part.CRC and not _has_checksum(archive, part):
            return False
    return True


def _has_checksum(archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(part) as content:  # which compares the checksum at its end
            while content.read(_CHUNK):
                pass
    except zipfile.BadZipFile as error:
        return "Bad CRC-32" not in str(error)
    return True
