"""How llama.cpp's converter may find a parameter in the table of the `gguf` package."""

from __future__ import annotations

from .site import Site


def gguf_spellings(parameter: str, site: Site) -> list[tuple[str, bool]]:
    """The names to look up, and whether each is of gate or up alone where the model has one tensor
    for both.

    They are without `.weight`, with the base model's prefix and without.

    >>> gguf_spellings("model.layers.0.mlp.down_proj.weight", Site(0, "mlp.down"))[:2]
    [('model.layers.0.mlp.down_proj', False), ('layers.0.mlp.down_proj', False)]
    """
    module = parameter.removesuffix(".weight")
    alone = module
    if site.expert is not None:
        alone = module.replace("gate_up_proj", f"{site.role.rpartition('.')[2]}_proj")
    names = ((module, False), (alone, alone != module))
    return [(spelled, apart) for name, apart in names for spelled in (name, name.partition(".")[2])]
