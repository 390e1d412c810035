"""The authors' own projector class with the weights of a `DeltaLlavaProjector`, for `projector.py --authors`.

The class is imported from a checkout of github.com/mzamini92/Delta-LLaVA; none of their code is in this repository. It
imports `einops` and, for stochastic depth, `timm`.
"""

import importlib.util
import re
from pathlib import Path

import torch
from torch import nn

from modeling_delta_llava.projector_delta_llava import DeltaLlavaProjector

BUILDER = Path("llava", "model", "multimodal_projector", "builder.py")
# Names of our parameters and of theirs, a pattern for each part.
NAMES = (
    (r"(query|key|value)_projection\.base\.", r"\1_proj_1.shared_weight."),
    (r"(query|key|value)_projection\.delta_u", r"\1_proj_1.U"),
    (r"(query|key|value)_projection\.delta_v", r"\1_proj_1.V"),
    (r"(query|key|value)_projection\.norm\.", r"\1_proj_1.norm."),
    (r"cross_attention\.out_proj\.", "clip_attn.out_proj."),
    (r"linear_1\.", "mlp.0."),
    (r"linear_2\.", "mlp.2."),
    (r"query_block\.input_proj\.", "combined_block.ntb.patch_embed.conv."),
    (r"query_block\.attention_norm\.", "combined_block.ntb.norm_mhsa."),
    (r"query_block\.attention\.out_proj\.", "combined_block.ntb.e_mhsa.proj."),
    (r"query_block\.attention\.([qkv])_proj\.", r"combined_block.ntb.e_mhsa.\1."),
    (r"query_block\.attention\.norm\.", "combined_block.ntb.e_mhsa.norm."),
    (r"query_block\.local_proj\.", "combined_block.ntb.projection.conv."),
    (r"query_block\.local_mixer\.conv\.", "combined_block.ntb.mhca.group_conv3x3."),
    (r"query_block\.local_mixer\.norm\.", "combined_block.ntb.mhca.norm."),
    (r"query_block\.local_mixer\.out_proj\.", "combined_block.ntb.mhca.projection."),
    (r"query_block\.mlp\.fc([12])\.", r"combined_block.ntb.mlp.conv\1."),
)


def their_weights(projector: DeltaLlavaProjector) -> dict[str, torch.Tensor]:
    """The projector's weights under their names; 1x1 convolutions still are matrices."""
    ours = projector.state_dict()
    weights = {
        f"clip_attn.in_proj_{kind}": torch.cat([ours.pop(f"cross_attention.{part}_proj.{kind}") for part in "qkv"])
        for kind in ("weight", "bias")
    }
    for name, tensor in ours.items():
        pattern, theirs = next(row for row in NAMES if re.match(row[0], name))
        name = re.sub(pattern, theirs, name)
        weights[re.sub(r"^(query|key|value)_", lambda match: f"{match[1][0]}_", name)] = tensor
    return weights


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
            shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
            shaped = {name: tensor.reshape(shapes[name]) for name, tensor in weights.items()}
            theirs.load_state_dict(shaped, assign=True)
            self.of_scale[str(scale)] = theirs

    def forward(self, query_features: torch.Tensor, memory_features: torch.Tensor, scale: int) -> torch.Tensor:
        """Arguments and result as those of `DeltaLlavaProjector.forward`."""
        return self.of_scale[str(scale)]((query_features, memory_features))
