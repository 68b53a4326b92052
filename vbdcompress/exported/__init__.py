"""Networks that torch.export wrote (.pt2): a graph of operations, given its layers back."""

from vbdcompress.exported.program import from_exported

__all__ = ["from_exported"]
