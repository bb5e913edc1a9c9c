"""The description of a torch_dist checkpoint is read whichever Python pickled it, and stays harmless."""

from __future__ import annotations

import enum
import pickle

import pytest
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_dtrpo.checkpoint.torch_dist import read_metadata
from megatron_dtrpo.errors import UserError


class Attribute:
    """Pickled as the attribute of something, the way Python 3.11.0 to 3.11.3 pickle a member of an enumeration."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def written(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    return tmp_path


def test_members_of_enumerations_are_read_from_every_python(tmp_path, monkeypatch):
    monkeypatch.setattr(enum.Enum, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
    properties = TensorProperties()
    assert _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT in properties.__getstate__()
    tensor = TensorStorageMetadata(properties=properties, size=(4, 2), chunks=[])
    folder = written(tmp_path, Metadata({"weight": tensor, "extra": BytesStorageMetadata()}))
    assert b"getattr" in (folder / ".metadata").read_bytes()
    assert read_metadata(folder).state_dict_metadata["weight"].properties == properties


@pytest.mark.parametrize(
    ("owner", "name"), [(Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "mro"), (Metadata({}), "__class__")]
)
def test_no_other_attribute_is_read(tmp_path, owner, name):
    with pytest.raises(UserError, match="not trusted: it reads an attribute"):
        read_metadata(written(tmp_path, Attribute(owner, name)))
