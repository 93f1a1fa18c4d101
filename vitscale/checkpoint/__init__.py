"""Checkpoints that exist whole or not at all, portable training state, and models in every format that others read."""

from vitscale.checkpoint.adaptation import adapt_to, check_trunk, load_into, without_head
from vitscale.checkpoint.certificate import CERTIFICATE_NAME, Certificate
from vitscale.checkpoint.export import ExportOptions, export_model, features_of, write_portable
from vitscale.checkpoint.formats import FORMATS, READERS, read_portable
from vitscale.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest, write_manifest
from vitscale.checkpoint.portable import Hints, LazyWeights, Origin, PortableModel, parameter_shapes
from vitscale.checkpoint.pretrained import load_pretrained
from vitscale.checkpoint.state import rank_file_name, read_fragments, stored_weights, write_fragments
from vitscale.checkpoint.store import CheckpointStore, locate, record_file, tag_of

__all__ = [
    "CERTIFICATE_NAME",
    "FORMATS",
    "MANIFEST_NAME",
    "READERS",
    "Certificate",
    "CheckpointStore",
    "ExportOptions",
    "FileRecord",
    "Hints",
    "LazyWeights",
    "Manifest",
    "Origin",
    "PortableModel",
    "adapt_to",
    "check_trunk",
    "export_model",
    "features_of",
    "load_into",
    "load_pretrained",
    "locate",
    "parameter_shapes",
    "rank_file_name",
    "read_fragments",
    "read_manifest",
    "read_portable",
    "record_file",
    "stored_weights",
    "tag_of",
    "without_head",
    "write_fragments",
    "write_manifest",
    "write_portable",
]
