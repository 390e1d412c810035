"""Where a model looks when it answers (Figure 1 of the paper): Grad-CAM over the patches, and what visual tokens read.

Symbols: H x W patches, V visual tokens, s the side of the window of patches that one visual token reads, S the side of
the square that the vision tower sees.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from delta_llava.errors import UserError, printable, reason, told
from modeling_delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from modeling_delta_llava.asking import check_question, load, open_image, parse_budgets
from modeling_delta_llava.building import check_budgets, check_chat_template
from modeling_delta_llava.projector_delta_llava import DeltaLlavaProjector

from . import heat_maps

# Visual tokens of Figure 1.
FIGURE_BUDGETS = (16, 64, 144)


@dataclass(frozen=True)
class Explanation:
    """Where the model looked at one budget.

    Attributes:
        num_visual_tokens: the budget, V.
        answer: what the model answered with it.
        heat: `(H, W)` float32 in [0, 1]: Grad-CAM or HiResCAM of the answer (or of one word of it), 1 at the hottest
            patch; all zeros if no patch speaks for it.
        attention: `(V, H, W)` float32: the share with which a visual token reads each patch, mean over heads. Each of
            the V maps sums to 1 and is zero outside of the token's own window.
        picture: `(S, S, 3)` uint8: what the vision tower saw, padding and crop included. Patch `(i, j)` covers rows
            `i * S / H` to `(i + 1) * S / H` and the columns likewise.
    """

    num_visual_tokens: int
    answer: str
    heat: np.ndarray
    attention: np.ndarray
    picture: np.ndarray


def explain(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    image: Image.Image | str | Path,
    question: str,
    num_visual_tokens: list[int] | None = None,
    token: str | None = None,
    max_new_tokens: int = 256,
    hirescam: bool = False,
) -> list[Explanation]:
    """Answers a question about one picture at several budgets and tells where the model looked for each answer.

    At every budget the answer is generated greedily. Its score is the sum of the log-probabilities of its tokens. The
    features of Grad-CAM are all that the projector reads of the tower: the query stream and every level of the memory
    stream, side by side as channels. A channel's weight is the mean over the patches of the score's gradient, and the
    heat of a patch the positive part of its weighted sum of channels. HiResCAM weights a patch with its own gradient.

    Args:
        model: in evaluation mode, of any dtype.
        processor: its processor.
        image: a picture in any form that the processor takes.
        question: what is asked.
        num_visual_tokens: budgets; by default those of the paper's figure, 16, 64 and 144, that the patch grid allows,
            and the model's own if it allows none.
        token: a word of the answer; the score is then of its tokens alone, where it first stands.
        max_new_tokens: longest answer.
        hirescam: HiResCAM (arXiv 2011.08891) in place of Grad-CAM (arXiv 1610.02391).

    Returns:
        One explanation for each budget, in their order.

    Raises:
        UserError: the model is no Delta-LLaVA, a budget is impossible, `token` is not in an answer, or the gradient is
            zero or not finite.
        ValueError: the processor or the model refuses picture or prompt.
    """
    config = model.config
    if config.model_type != DeltaLlavaConfig.model_type:
        raise UserError(f"the model is of type {config.model_type}: only a Delta-LLaVA can be explained")
    check_budgets(config, num_visual_tokens)
    in_figure = [budget for budget in FIGURE_BUDGETS if budget in config.legal_num_visual_tokens]
    budgets = list(dict.fromkeys(num_visual_tokens or in_figure or [config.num_visual_tokens]))
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_visual_tokens": budget},
        ).to(model.device)
        for budget in budgets
    ]
    seen = processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values[0]
    picture = seen.permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
    with torch.no_grad():
        query_features, memory_features, _ = model.model.get_patch_features(prompts[0].pixel_values)
    explanations = []
    for budget, prompt in zip(budgets, prompts, strict=True):
        scale = config.scale_factor(budget)
        features = [stream.detach().requires_grad_() for stream in (query_features, memory_features)]
        with torch.enable_grad():
            visual_tokens = model.model.multi_modal_projector(*features, scale)
            answer_ids = greedy_answer(model, prompt.input_ids, visual_tokens.detach(), max_new_tokens)
            answer = processor.tokenizer.decode(answer_ids, skip_special_tokens=True).strip()
            chosen = answer_positions(processor.tokenizer, answer_ids, token)
            if chosen is None:
                raise UserError(
                    f"{printable(token)!r} is not in the answer at {budget} visual tokens, {printable(answer)!r}: "
                    "name a word of it"
                )
            score = log_probabilities(model, prompt.input_ids, answer_ids, visual_tokens)[chosen].sum()
        # With one visual token for each patch the projector asks no queries: their stream has no part in the answer.
        gradients = torch.autograd.grad(score, features, allow_unused=True, materialize_grads=True)
        if chosen and not any(gradient.any() for gradient in gradients):
            raise UserError(
                f"no gradient of the answer at {budget} visual tokens, {printable(answer)!r}, reaches the patches: "
                "where 4-bit weights give none, explain on another device, or the model that is not quantised"
            )
        heat = class_activation(features, gradients, hirescam).view(config.grid_size, config.grid_size)
        if not heat.isfinite().all():
            raise UserError(
                f"the gradient of the answer at {budget} visual tokens, {printable(answer)!r}, is not finite: "
                "compute in bfloat16 or float32, or check the weights with `delta-llava verify`"
            )
        attention = window_attention(model.model.multi_modal_projector, *features, scale)
        explanations.append(Explanation(budget, answer, heat.cpu().numpy(), attention.cpu().numpy(), picture))
    return explanations


def encoded(visual_tokens: torch.Tensor) -> dict[str, BaseModelOutputWithPooling]:
    """Visual tokens `(1, V, D)` as the model takes them in place of pixels."""
    return {"image": BaseModelOutputWithPooling(pooler_output=visual_tokens)}


def greedy_answer(
    model: DeltaLlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    visual_tokens: torch.Tensor,
    max_new_tokens: int,
) -> torch.Tensor:
    """Ids `(T,)` of the likeliest answer, its end token included, to a prompt `(1, P)`."""
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        mm_encoder_outputs=encoded(visual_tokens),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
    )
    return output[0, input_ids.shape[1] :]


def answer_positions(tokenizer, answer_ids: torch.Tensor, word: str | None) -> list[int] | None:
    """Which of the ids `(T,)` are the answer's text, or the first place of a word in it; None if it is not there."""
    if word is None:
        special = set(tokenizer.all_special_ids)
        return [position for position, token_id in enumerate(answer_ids.tolist()) if token_id not in special]
    # A token may be part of a character, so that only whole beginnings of the answer have a text.
    beginnings = [
        tokenizer.decode(answer_ids[:length], skip_special_tokens=True) for length in range(len(answer_ids) + 1)
    ]
    text = beginnings[-1]
    # Only Latin words have their ends looked at: not every script puts spaces between words.
    found = re.search(rf"(?<![a-zà-ÿ0-9]){re.escape(word.strip())}(?![a-zà-ÿ0-9])", text, re.IGNORECASE)
    if found is None or not found[0]:
        return None
    first = max(length for length, beginning in enumerate(beginnings) if len(beginning) <= found.start())
    last = next(length for length, beginning in enumerate(beginnings) if beginning.startswith(text[: found.end()]))
    return list(range(first, last))


def log_probabilities(
    model: DeltaLlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    answer_ids: torch.Tensor,
    visual_tokens: torch.Tensor,
) -> torch.Tensor:
    """Log-probability `(T,)` of each token of an answer `(T,)` to a prompt `(1, P)` with visual tokens `(1, V, D)`."""
    sequence = torch.cat([input_ids, answer_ids[None]], dim=1)
    outputs = model(
        input_ids=sequence,
        attention_mask=torch.ones_like(sequence),
        mm_encoder_outputs=encoded(visual_tokens),
        logits_to_keep=len(answer_ids) + 1,
        use_cache=False,
    )
    predicted = outputs.logits[0, :-1].float().log_softmax(-1)
    return predicted.gather(1, answer_ids[:, None].to(predicted.device))[:, 0]


def class_activation(features: list[torch.Tensor], gradients: list[torch.Tensor], hirescam: bool) -> torch.Tensor:
    """Heat `(N,)` of features `(1, N, channels)`, 1 at the hottest patch: Grad-CAM, or HiResCAM, without pooling."""
    heat = torch.zeros(features[0].shape[1], device=features[0].device)
    for stream, gradient in zip(features, gradients, strict=True):
        weights = gradient.float() if hirescam else gradient.float().mean(dim=1, keepdim=True)
        heat = heat + (stream.detach().float() * weights).sum(-1)[0]
    heat = heat.relu()
    return heat / heat.max() if heat.any() else heat


@torch.no_grad()
def window_attention(
    projector: DeltaLlavaProjector, query_features: torch.Tensor, memory_features: torch.Tensor, scale: int
) -> torch.Tensor:
    """The projector's attention `(V, H, W)` for one picture: how much each visual token reads each patch.

    The queries and keys are those of its modules. Their softmax, which the fused attention does not give away, is
    taken here; the mean is over heads.
    """
    side = projector.source_grid_size
    grid_size = side // scale
    cross_attention = projector.cross_attention
    queries = cross_attention.q_proj(projector.queries(query_features, grid_size))
    keys = cross_attention.k_proj(projector.key_projection(memory_features))
    queries = cross_attention.windows(queries, grid_size, 1).float()  # [V, heads, 1, C / heads]
    keys = cross_attention.windows(keys, grid_size, scale).float()  # [V, heads, s * s, C / heads]
    shares = (queries @ keys.mT * keys.shape[-1] ** -0.5).softmax(-1).mean(1)  # [V, 1, s * s]
    attention = torch.zeros(grid_size, grid_size, side, side, device=shares.device)
    for token, window in enumerate(shares.view(-1, scale, scale)):
        row, column = divmod(token, grid_size)
        attention[row, column, row * scale : (row + 1) * scale, column * scale : (column + 1) * scale] = window
    return attention.flatten(0, 1)


def explain_to_file(
    model: str,
    image: str,
    question: str,
    output: Path,
    num_visual_tokens: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    max_new_tokens: int = 256,
    device: str = "auto",
    dtype: str = "auto",
    hirescam: bool = False,
) -> list[Explanation]:
    """`delta-llava explain`: the explanations of a folder's or repository's model, drawn into a PNG file.

    Raises:
        UserError: for anything the user can mend; the file is then not there, or as it was.
    """
    from transformers.utils import logging

    check_question(question)
    budgets = parse_budgets(num_visual_tokens)
    heat_maps.check_output(output)
    picture = open_image(image)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    network, processor = load(model, revision, device, dtype)
    content = [{"type": "image", "image": ""}, {"type": "text", "text": question}]
    check_chat_template(processor, model, [{"role": "user", "content": content}])
    return draw_explanations(network, processor, picture, question, output, budgets, token, max_new_tokens, hirescam)


def draw_explanations(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    image: Image.Image,
    question: str,
    output: Path,
    num_visual_tokens: list[int] | None = None,
    token: str | None = None,
    max_new_tokens: int = 256,
    hirescam: bool = False,
) -> list[Explanation]:
    """As `explain`, drawn into a PNG file.

    Raises:
        UserError: for anything the user can mend; the file is then not there, or as it was.
    """
    heat_maps.check_output(output)
    with told(
        "the model cannot be explained", "check it with `delta-llava verify`, or give one that is not quantised"
    ):
        try:
            explanations = explain(
                model, processor, image, question, num_visual_tokens, token, max_new_tokens, hirescam
            )
        except UserError:
            raise
        except ValueError as error:  # says what to mend in the question, the picture or the budget
            raise UserError(reason(error)) from error
    heat_maps.draw(explanations, question, output, token, "HiResCAM" if hirescam else "Grad-CAM")
    return explanations
