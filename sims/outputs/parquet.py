"""Every phase as a row of a Parquet file: the same bytes for the same timeline."""

import io
from collections.abc import Mapping
from dataclasses import fields

import pyarrow as pa
import pyarrow.parquet as pq

from sims.timeline import Phase, Timeline

FORMAT = "1"
TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}
UNITS = {"seconds": "s", "bytes": "bytes"}


def schema(about: Mapping[str, str] | None = None) -> pa.Schema:
    """One column per field of `Phase`, units in the fields' metadata; `about` (the question, the seed) in the file's."""
    columns = []
    for field in fields(Phase):
        unit = UNITS.get(field.name.rpartition("_")[2])
        columns.append(pa.field(field.name, TYPES[field.type], nullable=False, metadata={"unit": unit} if unit else None))  # type: ignore[index]
    return pa.schema(columns, metadata={"moelab.timeline": FORMAT, **dict(sorted((about or {}).items()))})


def parquet_bytes(timeline: Timeline, about: Mapping[str, str] | None = None) -> bytes:
    """The file of `timeline`: rows in the order in which they were recorded."""
    layout = schema(about)
    table = pa.table({name: pa.array(column, layout.field(name).type) for name, column in timeline.columns().items()}, schema=layout)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=3, version="2.6", data_page_version="2.0")
    return sink.getvalue()
