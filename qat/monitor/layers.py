"""layers.arrow: what was measured of each layer at each look, a columnar file in the run's folder that survives a kill.

It is an Arrow IPC stream without its end mark: the schema, then one record batch a look, each appended by one write. A torn last
batch is no batch, and everything before it is whole, so a kill at any byte loses that look alone; `pyarrow.ipc.open_stream`
reads the file while it grows. Rejected: Parquet and npz, whose index is at the end, so that a killed file is none; hundreds of
columns in metrics.csv.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from qat.monitor.table import HEALTH, LAYER_ONLY
from qat.storage import new_file

NAME = "layers.arrow"
STATISTICS = (*HEALTH, *LAYER_ONLY)
SCHEMA = pa.schema(
    [("step", pa.int64()), ("layer", pa.string()), ("family", pa.string()), *((name, pa.float32()) for name in STATISTICS)]
)


class LayersFile:
    """Appends looks at `layers`, name -> family, to the folder's file.

    Args:
        step: that of the checkpoint which a run goes on from: later looks are dropped, as they will be made again. None for a
            new run.
    """

    def __init__(self, folder: Path, layers: Mapping[str, str], step: int | None = None) -> None:
        self.file, self.layers = folder / NAME, layers
        kept = [] if step is None else [batch for batch in _batches(self.file) if batch["step"][0].as_py() <= step]
        self.last = kept[-1]["step"][0].as_py() if kept else -1
        self.file.unlink(missing_ok=True) if not kept else self._rewrite(kept)

    def write(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Append a look: statistic -> float32 [L], NaN where it says nothing; nothing where the step is there."""
        if step <= self.last:
            return
        count = len(self.layers)
        nothing = np.full(count, np.nan, dtype=np.float32)
        columns = [np.asarray(values.get(name, nothing), dtype=np.float32) for name in STATISTICS]
        named = [np.full(count, step), [*self.layers], [*self.layers.values()]]
        batch = pa.record_batch(
            [pa.array(column, kind.type) for column, kind in zip([*named, *columns], SCHEMA, strict=True)], SCHEMA
        )
        head = b"" if self.file.exists() else SCHEMA.serialize().to_pybytes()
        with self.file.open("ab") as file:
            file.write(head + batch.serialize().to_pybytes())
        self.last = step

    def _rewrite(self, batches: list[pa.RecordBatch]) -> None:
        with new_file(self.file) as partial:
            partial.write_bytes(b"".join(one.serialize().to_pybytes() for one in (SCHEMA, *batches)))


def read_layers(folder: Path) -> dict[str, np.ndarray]:
    """The looks of a run: `step` int64 [S], `layer` and `family` str [L], and each of `STATISTICS` float32 [S, L].

    NaN stands where something was not measured. {} where the run has no such file, or none that can be read.
    """
    looks = {batch["step"][0].as_py(): batch for batch in _batches(folder / NAME)}
    families: dict[str, str] = {}
    for batch in looks.values():
        families |= dict(zip(batch["layer"].to_pylist(), batch["family"].to_pylist(), strict=True))
    if not families:
        return {}
    place = {name: i for i, name in enumerate(families)}
    found = {name: np.full((len(looks), len(families)), np.nan, dtype=np.float32) for name in STATISTICS}
    for row, batch in enumerate(looks.values()):
        at = [place[name] for name in batch["layer"].to_pylist()]
        for name, values in found.items():
            values[row, at] = batch[name].to_numpy(zero_copy_only=False)
    named = {"layer": np.array([*families]), "family": np.array([*families.values()])}
    return {"step": np.array([*looks], dtype=np.int64), **named, **found}


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    """The whole batches of a file, up to the first that is not."""
    try:
        reader = pa.ipc.open_stream(pa.py_buffer(file.read_bytes()))
        while reader.schema.equals(SCHEMA):
            batch = reader.read_next_batch()
            batch.validate(full=True)
            if batch.num_rows:
                yield batch
    except (OSError, StopIteration, pa.ArrowInvalid):  # none, its end, or torn
        return
