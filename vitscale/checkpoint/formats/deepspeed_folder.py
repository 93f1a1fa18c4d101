"""Folders that DeepSpeed's own save_checkpoint or its converter to a universal checkpoint wrote, read only."""

import hashlib
from pathlib import Path

from tqdm import tqdm

from vitscale.checkpoint.containers import TensorFile
from vitscale.checkpoint.deepspeed_files import Contents, is_deepspeed, read_deepspeed
from vitscale.checkpoint.formats.state_dict import undescribed
from vitscale.checkpoint.integrity import sha256_of
from vitscale.checkpoint.portable import Hints, Origin, PortableModel


class DeepSpeedReader:
    """See `Reader`."""

    name = "deepspeed"

    def recognises(self, path: Path) -> bool:
        """A folder of tags, or a tag."""
        return is_deepspeed(path)

    def read(self, path: Path, hints: Hints) -> PortableModel:
        """See `Reader`. The weights are the fp32 ones; `hints.name` must be given, as for a bare state dict."""
        contents = read_deepspeed(path, hints.unsafe_pickle)
        file = TensorFile(contents.tag, contents.shapes, lambda name: contents.weights[name]())
        tag = f"{contents.tag.resolve().parent.name}/{contents.tag.name}"
        trained = {"source": tag, "step": contents.step}
        return undescribed(file, Origin(tag, _digest(contents)), hints, trained)


def _digest(contents: Contents) -> str:
    """SHA-256 over the names and the SHA-256 of all files that were read."""
    digest = hashlib.sha256()
    for path in tqdm(contents.files, desc="hashing", unit="file", disable=None, leave=False):
        digest.update(f"{path.relative_to(contents.tag)} {sha256_of(path)}\n".encode())
    return digest.hexdigest()
