"""The one layer that a slim network may have and a plain one has not."""

from torch import Tensor, nn


class GatherLinear(nn.Linear):
    """nn.Linear that first picks features from its input: [..., width] -> [..., in_features].

    For inputs and flattened features that no layer writes one by one: the layer that reads them
    leaves the removed ones out. `input_index` [in_features] says which it picks.
    """

    input_index: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.index_select(-1, self.input_index))
