"""The model card: one template. What it says comes from config, trainer and variant, and stays in its metadata.

The metadata's entry `delta_llava` holds what a later card is written from again: `repo_id`, `revision`, `variant` and
`training`. Nothing is read back from a card's text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import logging as hub_logging
from transformers import TrainerState, TrainingArguments

from delta_llava.errors import reason, told

from .configuration_delta_llava import TRANSFORMERS_RANGE
from .sources import is_hub_id

PAPER = {
    "title": "Delta-LLaVA: Base-then-Specialize Alignment for Token-Efficient Vision-Language Models",
    "authors": "Mohamad Zamini and Diksha Shukla",
    "arxiv": "2512.18910",
    "url": "https://arxiv.org/abs/2512.18910",
    "code": "https://github.com/mzamini92/Delta-LLaVA",
    "unrelated_arxiv": "2604.14044",
}
TEMPLATE = Path(__file__).with_name("card_template.md")
EXAMPLE = Path(__file__).with_name("example.png")
"""A drawing to ask about, which the snippets fetch from the repository."""
STATE = "delta_llava"
PLACEHOLDER = "YOUR_NAME"
PIPELINE_TAG = "image-text-to-text"
LIBRARY = "transformers"
TAGS = ("delta-llava", "llava", "multimodal", "visual-token-compression", "custom_code", f"arxiv:{PAPER['arxiv']}")
SKIP_MODULES = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
"""What stays in 16 bit when a model is quantised, as bitsandbytes matches names: from the start of the full name."""
LICENCE_FIELDS = ("license", "license_name", "license_link")
MOST_LOSSES = 10


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Attributes:
        name: title, and name of the model in model-index.
        config: config.json.
        repo_id, revision: what the snippets load; without the first a placeholder.
        variant: name of the listed variant that it is.
        licence: `license`, and with "other" `license_name` and `license_link`; empty when none is known.
        licence_file: whether the repository has its text as LICENSE.
        base_models, datasets, languages: Hub ids and ISO codes for the metadata.
        relation: "finetune", "adapter" or "quantized".
        parameters: in the weights, None when unknown.
        training: see [`training_facts`].
        quantization: keys bits, method, of; None for full weights.
    """

    name: str
    config: dict[str, Any]
    repo_id: str | None = None
    revision: str = "main"
    variant: str | None = None
    licence: dict[str, str] = field(default_factory=dict)
    licence_file: bool = False
    base_models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    relation: str = "finetune"
    parameters: int | None = None
    training: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None


def render(facts: Facts, results: Sequence[EvalResult] = (), **variant: Any) -> ModelCard:
    """The card of a repository, from facts alone (no file but the template is read).

    Args:
        results: for the metadata's model-index.
        variant: what only a listed variant's card says, see the template.

    Raises:
        UserError: the training that an earlier card's metadata states is not what this package writes there.
    """
    vision = facts.config["vision_config"]
    side = vision["image_size"] // vision["patch_size"]
    budgets = [(side // scale) ** 2 for scale in range(1, side + 1) if side % scale == 0]
    tokens = facts.config["num_visual_tokens"]
    advice = f"delete `{STATE}` from the metadata of the present one"
    with told(f"the card of {facts.name} cannot be written", advice):
        return ModelCard.from_template(
            _metadata(facts, results),
            template_path=str(TEMPLATE),
            facts=facts,
            repo_id=facts.repo_id or f"{PLACEHOLDER}/{facts.name}",
            paper=PAPER,
            example=EXAMPLE.name,
            side=side,
            legal_budgets=budgets,
            # Of two pictures: the model's own budget, and the next smaller one.
            snippet_budgets=[tokens, max((budget for budget in budgets if budget < tokens), default=tokens)],
            skip_modules=str(SKIP_MODULES).replace("'", '"'),
            transformers_range=TRANSFORMERS_RANGE,
            **{"details": (), **variant},
        )


def _metadata(facts: Facts, results: Sequence[EvalResult]) -> ModelCardData:
    tags = [*TAGS]
    if facts.quantization:
        tags += ["bitsandbytes", f"{facts.quantization['bits']}-bit"]
    state = {name: getattr(facts, name) for name in ("repo_id", "revision", "variant", "training")}
    base = list(facts.base_models)
    return ModelCardData(
        language=list(facts.languages) or None,
        **facts.licence,
        library_name="peft" if facts.relation == "adapter" else LIBRARY,
        pipeline_tag=PIPELINE_TAG,
        base_model=(base if len(base) > 1 else base[0]) if base else None,
        base_model_relation=facts.relation if base else None,
        datasets=list(facts.datasets) or None,
        tags=tags,
        model_name=facts.name if results else None,
        eval_results=list(results) or None,
        **{STATE: {name: value for name, value in state.items() if value}},
    )


def load_card(folder: Path) -> ModelCard:
    """The folder's README.md. Raises `ValueError` when its metadata is not valid YAML or breaks model-index."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # a README without metadata is reported by our own words
    try:
        return ModelCard.load(folder / "README.md")
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"its metadata is not valid ({reason(error)})") from error
    finally:
        hub_logging.set_verbosity(verbosity)


def metadata_of(folder: Path) -> dict[str, Any]:
    """The metadata of a folder's present card; empty without a readable one."""
    try:
        return load_card(folder).data.to_dict()
    except (OSError, ValueError):
        return {}


def state_of(metadata: dict[str, Any]) -> dict[str, Any]:
    """What the metadata of a card of ours states about itself, see above; empty for another's."""
    state = metadata.get(STATE)
    return state if isinstance(state, dict) else {}


# --- training --------------------------------------------------------------------------------------------------------


def trained_card(
    settings: dict[str, Any],
    state: TrainerState,
    args: TrainingArguments,
    config: Any,
    parts: Sequence[tuple[str, int, int]],
    is_adapter: bool = False,
) -> ModelCard:
    """The card that goes with every folder a training run saves.

    Args:
        settings: the run's own: `model` or `language_model` and `vision_tower`, `data_path`, `streaming`, `format`,
            and the number of `rows`.
        state: steps, epochs and the log so far.
        args: hyper-parameters.
        config: the model's config.
        parts: name, trained and frozen parameters of each part.
        is_adapter: the folder holds a LoRA adapter and not a whole model.
    """
    sources = {name: settings[name] for name in ("model", "language_model", "vision_tower") if settings.get(name)}
    data, rows = settings.get("data_path"), settings.get("rows", "all")
    dataset = hub_name(data)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    hyper_parameters = {
        "learning rate": args.learning_rate,
        "projector learning rate": getattr(args, "projector_learning_rate", None),
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warm-up": args.warmup_steps,
        "batch (all devices)": batch,
        "weight decay": args.weight_decay,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "budget weights": getattr(args, "visual_token_budget_weights", None),
        "seed": args.seed,
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
    }
    training = {
        "started_from": {name.replace("_", " "): shown(value) for name, value in sources.items()},
        "data": shown(data) or "in memory",
        "rows": "streamed" if settings.get("streaming") else f"{rows:,}" if isinstance(rows, int) else rows,
        "format": str(settings.get("format", "template")),
        "num_visual_tokens": list(config.trained_num_visual_tokens or [config.num_visual_tokens]),
        "parts": [list(part) for part in parts],
        "settings": {name: value for name, value in hyper_parameters.items() if value is not None},
        **progress(state),
    }
    return render(
        Facts(
            Path(args.output_dir).name,
            config.to_dict(),
            repo_id=args.hub_model_id,
            base_models=tuple(name for value in sources.values() if (name := hub_name(value))),
            datasets=(dataset,) if dataset else (),
            relation="adapter" if is_adapter else "finetune",
            parameters=sum(trained + frozen for _, trained, frozen in parts),
            training=training,
        )
    )


def progress(state: TrainerState) -> dict[str, Any]:
    """Steps, epochs and losses: at most [`MOST_LOSSES`] rows (step, loss, evaluation loss), the last one included."""
    by_step: dict[int, dict[str, float]] = {}
    for entry in state.log_history:
        if "step" in entry and ("loss" in entry or "eval_loss" in entry):
            by_step.setdefault(int(entry["step"]), {}).update(entry)
    steps = sorted(by_step)
    if len(steps) > MOST_LOSSES:
        steps = [steps[round(place * (len(steps) - 1) / (MOST_LOSSES - 1))] for place in range(MOST_LOSSES)]
    losses = [[step, by_step[step].get("loss"), by_step[step].get("eval_loss")] for step in steps]
    return {"step": state.global_step, "steps": state.max_steps, "epoch": float(state.epoch or 0), "losses": losses}


def hub_name(name: str | None) -> str | None:
    """`owner/name` as it is; nothing for paths, which mean nothing on another machine."""
    return name if name and is_hub_id(name) else None


def shown(name: str | None) -> str | None:
    """A name for the card: Hub names whole, paths by their last part."""
    return hub_name(name) or (Path(name).name if name else None)
