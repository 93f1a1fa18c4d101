"""Checkpoints that exist whole or not at all, portable training state, and models in every format that others read."""

from vitscale.checkpoint.adaptation import adapt_to, check_trunk, load_into, without_head
from vitscale.checkpoint.adoption import adopt
from vitscale.checkpoint.background import BackgroundTask, collect_records, leave_record
from vitscale.checkpoint.certificate import CERTIFICATE_NAME, Certificate
from vitscale.checkpoint.deepspeed_files import read_deepspeed
from vitscale.checkpoint.export import ExportOptions, export_model, features_of, write_portable
from vitscale.checkpoint.formats import FORMATS, READERS, format_of, read_portable
from vitscale.checkpoint.index import INDEX_NAME, rank_file_name, write_index
from vitscale.checkpoint.integrity import record_file
from vitscale.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest, write_manifest
from vitscale.checkpoint.mirror import Mirror
from vitscale.checkpoint.mirroring import mirror_of, restore_newest, update_mirror
from vitscale.checkpoint.portable import Hints, LazyWeights, Origin, PortableModel, parameter_shapes
from vitscale.checkpoint.pretrained import load_pretrained
from vitscale.checkpoint.snapshot import Snapshot, write_fragments
from vitscale.checkpoint.source import locate, pin_branch
from vitscale.checkpoint.state import read_fragments, stored_weights
from vitscale.checkpoint.store import CheckpointStore
from vitscale.checkpoint.tags import tag_of
from vitscale.checkpoint.uploads import Uploads

__all__ = [
    "CERTIFICATE_NAME",
    "FORMATS",
    "INDEX_NAME",
    "MANIFEST_NAME",
    "READERS",
    "BackgroundTask",
    "Certificate",
    "CheckpointStore",
    "ExportOptions",
    "FileRecord",
    "Hints",
    "LazyWeights",
    "Manifest",
    "Mirror",
    "Origin",
    "PortableModel",
    "Snapshot",
    "Uploads",
    "adapt_to",
    "adopt",
    "check_trunk",
    "collect_records",
    "export_model",
    "features_of",
    "format_of",
    "leave_record",
    "load_into",
    "load_pretrained",
    "locate",
    "mirror_of",
    "parameter_shapes",
    "pin_branch",
    "rank_file_name",
    "read_deepspeed",
    "read_fragments",
    "read_manifest",
    "read_portable",
    "record_file",
    "restore_newest",
    "stored_weights",
    "tag_of",
    "update_mirror",
    "without_head",
    "write_fragments",
    "write_index",
    "write_manifest",
    "write_portable",
]
