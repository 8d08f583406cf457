"""From a site to the tensor of a checkpoint that stores it; the table is
`surgeon.anatomy.names`.
"""

from ..anatomy.names import TensorNames, checkpoint_address

__all__ = ["TensorNames", "checkpoint_address"]
