"""Export as plain safetensors in the checkpoint's own dtype ("fake quant"): every weight is what
its code means, for any loader.

How this works. A shard is copied byte by byte, and each quantized matrix is then written over its
own bytes in the copy, rounded to the dtype that is stored there. So names, order, metadata and all
that is not quantized stay as they are, and a fused tensor needs no care: a view writes its rows.
"""

from __future__ import annotations

from pathlib import Path

from ...anatomy.folder import overwrite
from ..quantize import by_site, quantize_view_
from .export import Done, ExportPlan, Reports, Source, write_folder


def export_dense(plan: ExportPlan) -> Reports:
    """Write the quantized checkpoint, as large as its source; what it computes is, bit for bit,
    what `quantize_` makes of the model.

    Raises: as `write_folder`.
    """

    def write_shard(source: Source, shard: str, output: Path, tell: Done) -> Reports:
        # names, shapes and dtypes stay, so the file does too, but for the numbers
        source.shards.copy(shard, output)
        critical = by_site(source.anatomy, plan.critical)
        reports: Reports = {}
        for name in source.shards.within(shard):
            if name not in source.sites:
                continue
            tensor = source.shards.read(name)
            for view in source.views(name, tensor):
                reports[view.site] = quantize_view_(
                    view, plan.config, critical.get(view.site, ()), plan.mean_squares.get(view.site)
                )
                tell(view.site)
            overwrite(output, source.shards.stored[name], tensor)
        return reports

    return write_folder(plan, "dense", write_shard)
