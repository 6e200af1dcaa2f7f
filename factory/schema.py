"""The Lance tables of a dataset root: columns, types and keys, and nothing else."""

from __future__ import annotations

import lance
import pyarrow as pa

FORMAT = "4"  # raised when a reader of the older tables would be wrong
STORAGE_VERSION = "2.2"  # the first Lance file format with blob v2 columns
EMBEDDING = "layout-8x8-rgb"  # recorded in the table's metadata; a table with another one is refused
EMBEDDING_SIZE = 192

_KEY = {"lance-schema:unenforced-primary-key": "true"}


def _key(name: str) -> pa.Field:
    return pa.field(name, pa.string(), nullable=False, metadata=_KEY)


def _table(*fields: pa.Field) -> pa.Schema:
    return pa.schema(
        fields,
        metadata={
            "animesketch.format": FORMAT,
            "animesketch.embedding": EMBEDDING,
            "animesketch.embedding_size": str(EMBEDDING_SIZE),
        },
    )


_EMBEDDING = pa.field("embedding", pa.list_(pa.float32(), EMBEDDING_SIZE))  # unit length
_SCORES = (
    pa.field("sharpness", pa.float32()),  # variance of the Laplacian at a 360 px short side, 8-bit grey levels squared
    pa.field("brightness", pa.float32()),  # mean luma, 0..1
    pa.field("contrast", pa.float32()),  # standard deviation of luma, 0..0.5
    pa.field("entropy", pa.float32()),  # bits of the luma histogram, 0..8
    pa.field("text_share", pa.float32()),  # of the picture, covered by text above its lower quarter, 0..0.75
    pa.field("subtitle_share", pa.float32()),  # of the picture, covered by text in its lower quarter, 0..0.25
)

SOURCES = _table(
    _key("source_id"),  # sha256 of the bytes; of "uri:" + uri where they can't be read
    pa.field("uri", pa.string()),
    pa.field("other_uris", pa.list_(pa.string())),  # where the same bytes were found besides
    pa.field("collection", pa.string()),  # the folder's name: a series, a film
    pa.field("container", pa.string()),
    pa.field("codec", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("fps", pa.float64()),  # average
    pa.field("start_time", pa.float64()),  # s, the container's own offset
    pa.field("duration", pa.float64()),  # s
    pa.field("size_bytes", pa.int64()),
    pa.field("modified_ns", pa.int64()),  # since 1970; size and this unchanged: the file is not hashed again
    pa.field("title", pa.string()),
    pa.field("rights_holder", pa.string()),
    pa.field("licence", pa.string()),  # "unknown" unless the user says otherwise
    pa.field("url", pa.string()),
    pa.field("redistributable", pa.bool_()),
    pa.field("status", pa.string()),  # pending, ok, partial, failed
    pa.field("error", pa.string()),
    pa.field("segment_starts", pa.list_(pa.float64())),  # s; fixed when the source is first seen
    pa.field("shots", pa.int32()),
    pa.field("candidates", pa.int32()),
)

CANDIDATES = _table(
    _key("frame_id"),  # <source_id[:16]>-<microseconds>
    pa.field("source_id", pa.string(), nullable=False),
    pa.field("segment_id", pa.string(), nullable=False),
    pa.field("frame_index", pa.int64()),
    pa.field("timestamp", pa.float64()),  # s from the stream's first frame
    pa.field("shot", pa.string()),  # <source_id[:16]>-<microseconds of the shot's first frame>
    pa.field("shot_start", pa.float64()),  # s
    pa.field("shot_end", pa.float64()),  # s
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    lance.blob_field("image"),
    pa.field("image_sha256", pa.string()),
    pa.field("bar_top", pa.int32()),  # pixels of the decoded frame that black bars cover; cut off by video.crop_bars
    pa.field("bar_bottom", pa.int32()),
    pa.field("bar_left", pa.int32()),
    pa.field("bar_right", pa.int32()),
    pa.field("subtitle_height", pa.int32()),  # pixels from the lower edge (or bar) to the text's top
    *_SCORES,
    pa.field("phash", pa.int64()),  # 64 bits
    pa.field("signature", pa.binary()),  # 32x32 cells of luma, Cr, Cb: what duplicates are compared by
    _EMBEDDING,
    pa.field("status", pa.string()),  # kept, dropped, failed; null until a selection has decided
    pa.field("reason", pa.string()),
    pa.field("score", pa.float32()),  # the score that decided
    pa.field("threshold", pa.float32()),  # what it was compared with
    pa.field("duplicate_of", pa.string()),
    pa.field("decode_fingerprint", pa.string()),
    pa.field("select_fingerprint", pa.string()),
)

STAGES = pa.struct([pa.field(stage, pa.string()) for stage in ("decode", "select", "sketch", "caption")])

TONE = pa.struct(  # of sketch.tone.Tone, but its ink ratio
    [
        pa.field("brightened", pa.bool_()),
        *(pa.field(name, pa.uint8()) for name in ("black", "white")),
        *(pa.field(name, pa.float32()) for name in ("gamma", "clipped_black", "clipped_white")),
        *(pa.field(name, pa.uint8()) for name in ("p01", "p05", "p25")),
    ]
)

SAMPLES = _table(
    _key("frame_id"),
    pa.field("source_id", pa.string(), nullable=False),
    pa.field("frame_index", pa.int64()),
    pa.field("timestamp", pa.float64()),
    pa.field("shot", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    lance.blob_field("image"),
    pa.field("image_sha256", pa.string()),
    lance.blob_field("sketch"),
    pa.field("sketch_width", pa.int32()),
    pa.field("sketch_height", pa.int32()),
    pa.field("sketch_sha256", pa.string()),
    pa.field("ink_ratio", pa.float32()),  # share of the lines' pixels darker than mid grey; a page's margins left out
    pa.field("tone", TONE),
    lance.blob_field("training_sketch"),  # PNG, long side at most 1024
    lance.blob_field("thumbnail"),  # JPEG: frame left, sketch right
    pa.field("caption", pa.string()),
    pa.field("caption_by", pa.string()),  # model id, rule or reviewer
    pa.field("keywords", pa.list_(pa.string())),
    pa.field("itm_score", pa.float32()),
    *_SCORES,
    _EMBEDDING,
    pa.field("split", pa.string()),  # train, validation; by source, never by frame
    pa.field("selected", pa.bool_()),
    pa.field("review", pa.string()),  # pending, accepted, rejected
    pa.field("stages", STAGES),  # fingerprint of code, config and model per stage
)

EDITS = _table(
    _key("edit_id"),
    pa.field("frame_id", pa.string(), nullable=False),
    pa.field("field", pa.string()),
    pa.field("old", pa.string()),
    pa.field("new", pa.string()),
    pa.field("author", pa.string()),
    pa.field("time", pa.timestamp("us", tz="UTC")),
    pa.field("round", pa.string()),
)

TABLES = {"sources": SOURCES, "candidates": CANDIDATES, "samples": SAMPLES, "edits": EDITS}
KEYS = {"sources": "source_id", "candidates": "frame_id", "samples": "frame_id", "edits": "edit_id"}
BLOBS = {
    "sources": (),
    "candidates": ("image",),
    "samples": ("image", "sketch", "training_sketch", "thumbnail"),
    "edits": (),
}


def is_blob(field: pa.Field) -> bool:
    """Return whether `field` is a Lance blob column."""
    return getattr(field.type, "extension_name", "") == "lance.blob.v2"


def to_table(name: str, rows: list[dict]) -> pa.Table:
    """Return `rows` (missing columns are null) as an Arrow table in the schema of table `name`."""
    return arrange(rows, TABLES[name])


def arrange(rows: list[dict], schema: pa.Schema) -> pa.Table:
    """Return `rows` as an Arrow table with exactly the columns of `schema`; blob columns take bytes or None."""
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        columns.append(lance.blob_array(values) if is_blob(field) else pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)
