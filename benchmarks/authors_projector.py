"""The released computation with the weights of a `DeltaLlavaProjector`: the baselines of `projector.py`.

`ReleasedProjector` is our rendering of it, which the tests of the conversion use too. `AuthorsProjector` is the
authors' own class, for `projector.py --authors`: it is imported from a checkout of github.com/mzamini92/Delta-LLaVA;
none of their code is in this repository. It imports `einops` and, for stochastic depth, `timm`.
"""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from modeling_delta_llava.conversion.tables import DELTA_ROWS, PROJECTOR, TRAINED_PROJECTOR, backwards, new_name
from modeling_delta_llava.conversion.write import with_parts_joined
from modeling_delta_llava.projector_delta_llava import DeltaLlavaProjector
from tests.conversion.reference import delta_projector, sincos_table

BUILDER = Path("llava", "model", "multimodal_projector", "builder.py")


def their_weights(projector: DeltaLlavaProjector) -> dict[str, torch.Tensor]:
    """The projector's weights under their names and in their shapes."""
    ours = with_parts_joined({f"{PROJECTOR}{name}": tensor for name, tensor in projector.state_dict().items()})
    table = backwards(DELTA_ROWS)
    return {new_name(name, table).removeprefix(TRAINED_PROJECTOR): tensor for name, tensor in ours.items()}


class ReleasedProjector(nn.Module):
    """The released computation in our own words, with a projector's weights.

    Args:
        projector: source of the weights; its geometry must be the released one.
    """

    def __init__(self, projector: DeltaLlavaProjector):
        super().__init__()
        self.weights = their_weights(projector)
        self.heads = projector.cross_attention.num_heads
        self.head_dim = projector.query_block.attention.head_dim
        base = projector.query_projection.base
        table = sincos_table(base.in_features, projector.source_grid_size)
        self.positions = table.to(base.weight)

    def forward(self, query_features: torch.Tensor, memory_features: torch.Tensor, scale: int) -> torch.Tensor:
        """Arguments and result as those of `DeltaLlavaProjector.forward`."""
        return delta_projector(
            self.weights, query_features, memory_features, scale, self.heads, self.head_dim, self.positions
        )


class AuthorsProjector(nn.Module):
    """Their class, built once for each side of a window, around one set of weights.

    Args:
        checkout: folder of the authors' repository.
        projector: source of the weights; its geometry must be the released one.
        scales: sides of the windows that will be asked for.
    """

    def __init__(self, checkout: Path, projector: DeltaLlavaProjector, scales: list[int]):
        super().__init__()
        spec = importlib.util.spec_from_file_location("authors_builder", checkout / BUILDER)
        builder = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(builder)
        weights, last = their_weights(projector), projector.linear_2.weight
        self.of_scale = nn.ModuleDict()
        for scale in scales:
            theirs = builder.Delta_LLaVA(scale, hidden_size=len(last)).to(last)
            theirs.load_state_dict(weights, assign=True)
            self.of_scale[str(scale)] = theirs

    def forward(self, query_features: torch.Tensor, memory_features: torch.Tensor, scale: int) -> torch.Tensor:
        """Arguments and result as those of `DeltaLlavaProjector.forward`."""
        return self.of_scale[str(scale)]((query_features, memory_features))
