"""Checkpoints that exist whole or not at all, portable training state, and exported models."""

from vitscale.checkpoint.exported import CARD_NAME, WEIGHTS_NAME, Card, export_model, load_exported, read_card
from vitscale.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest, write_manifest
from vitscale.checkpoint.state import assemble_weights, rank_file_name, read_fragments, write_fragments
from vitscale.checkpoint.store import CheckpointStore, locate, record_file, tag_of

__all__ = [
    "CARD_NAME",
    "MANIFEST_NAME",
    "WEIGHTS_NAME",
    "Card",
    "CheckpointStore",
    "FileRecord",
    "Manifest",
    "assemble_weights",
    "export_model",
    "load_exported",
    "locate",
    "rank_file_name",
    "read_card",
    "read_fragments",
    "read_manifest",
    "record_file",
    "tag_of",
    "write_fragments",
    "write_manifest",
]
