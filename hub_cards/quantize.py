"""Quantised repositories: bitsandbytes weights that plain `from_pretrained` loads."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from delta_llava.errors import UserError
from modeling_delta_llava.folders import check_output_folder
from modeling_delta_llava.foreign_code import refuse_foreign_code
from modeling_delta_llava.hub_cards.card import DEFAULT_REVISION, SKIP_MODULES, read_config, write_card
from modeling_delta_llava.hub_cards.metadata import check_repository, load_card, snippet_repositories

PLACEHOLDER = "YOUR_NAME/"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
LEFT_OUT = (".eval_results", "config.json", "scores.png", "eval")  # said of the full weights, or written anew


def _source_repository(folder: Path) -> str | None:
    """The repository that the source folder is published as, from the snippets of its card."""
    if not (folder / "README.md").is_file():
        return None
    try:
        names = snippet_repositories(load_card(folder).text)
    except ValueError:
        return None
    return next((name for name in names if not name.startswith(PLACEHOLDER)), None)


def _check(folder: Path, output: Path, bits: int, base_model: str | None, repo_id: str | None) -> str:
    """The id of the unquantised model. Raises `UserError` when quantising cannot work."""
    config = read_config(folder)
    for name in (base_model, repo_id):
        if name is not None:
            check_repository(name)
    if bits not in (4, 8):
        raise UserError(f"--bits {bits}: bitsandbytes quantises to 4 or 8 bits")
    if "quantization_config" in config:
        raise UserError(f"{folder} is quantised already: give the folder it was made from")
    refuse_foreign_code(folder)
    check_output_folder(output, str(output), "is not empty", is_ours=False)
    known = base_model or _source_repository(folder)
    if known is None:
        raise UserError(
            f"the Hub id of the model in {folder} is not known, and the card must name it: give --base-model "
            "NAMESPACE/NAME, or write the source's card with --repo-id"
        )
    try:
        import bitsandbytes  # noqa: F401 (transformers needs it)
    except ImportError as error:
        raise UserError(
            f'bitsandbytes cannot be imported ({error}): pip install "delta-llava[quantization]"'
        ) from error
    return known


def quantize(
    folder: Path,
    output: Path,
    bits: int = 4,
    base_model: str | None = None,
    repo_id: str | None = None,
    revision: str = DEFAULT_REVISION,
    device: str = "auto",
    skip_modules: Sequence[str] = tuple(SKIP_MODULES),
) -> Path:
    """Writes a quantised copy of a Hub folder: the language model in 4 (NF4) or 8 bit, all else in 16 bit.

    Args:
        folder: a Hub folder.
        output: new folder.
        bits: 4 or 8.
        base_model: Hub id of the unquantised model; by default what the source's card loads in its snippets.
        repo_id, revision: for the snippets of the new card.
        device: "auto", "cpu" or "cuda".
        skip_modules: module names that stay in 16 bit, matched from the start of the full name.

    Returns:
        `output`, which loads with plain `from_pretrained(..., trust_remote_code=True)` on CPU and GPU.

    Raises:
        UserError: bitsandbytes is missing, the source is no Delta-LLaVA folder or brings code that is not this
            package's, or `output` is not empty or no place for a model.
    """
    folder, output = Path(folder), Path(output)
    base = _check(folder, output, bits, base_model, repo_id)
    import torch
    from transformers import BitsAndBytesConfig

    from modeling_delta_llava import DeltaLlavaForConditionalGeneration

    options = {"llm_int8_skip_modules": list(skip_modules)}
    if bits == 4:
        options |= {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    else:
        options["load_in_8bit"] = True
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    # With this package's code, whatever the folder holds.
    model = DeltaLlavaForConditionalGeneration.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(**options),
        device_map={"": where},
    )
    output.mkdir(parents=True, exist_ok=True)
    # Everything but the weights is the source's; what saving writes as well goes on top.
    ignored = shutil.ignore_patterns(*WEIGHTS, *LEFT_OUT)
    shutil.copytree(folder, output, ignore=ignored, dirs_exist_ok=True)
    model.save_pretrained(output)
    _keep_portable(output)
    write_card(output, repo_id=repo_id, revision=revision, base_models=[base])
    return output


def _keep_portable(output: Path) -> None:
    """Takes out of config.json what only held on the machine that quantised: the path of the source."""
    path = output / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
