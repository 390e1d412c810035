"""Quantised repositories: bitsandbytes weights that plain `from_pretrained` loads."""

import shutil
from pathlib import Path

from delta_llava.errors import UserError, told
from modeling_delta_llava.asking import check_device
from modeling_delta_llava.card import SKIP_MODULES, metadata_of, state_of
from modeling_delta_llava.folders import atomic_folder, check_output, check_space
from modeling_delta_llava.foreign_code import RESULTS_FOLDER, refuse_foreign_code
from modeling_delta_llava.hub_cards.card import DEFAULT_REVISION, FIGURE, MEASURED_FIGURE, read_config, write_card
from modeling_delta_llava.hub_cards.contents import list_files, problem_of
from modeling_delta_llava.hub_cards.metadata import check_repository
from modeling_delta_llava.json_files import read_json, write_json

# Said of the full weights, or written anew.
NOT_COPIED = (
    *("*.safetensors", "*.safetensors.index.json", ".eval_results", "config.json"),
    *(FIGURE, MEASURED_FIGURE, RESULTS_FOLDER),
)


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
    check_output(output, {"FOLDER": folder}, overwrite=False)
    known = base_model or state_of(metadata_of(folder)).get("repo_id")
    if known is None:
        raise UserError(
            f"the Hub id of the model in {folder} is not known, and the card must name it: give --base-model "
            "NAMESPACE/NAME, or write the source's card with --repo-id"
        )
    # Room for the half of 16 bits, and for what is not quantised.
    check_space(output, sum(file.stat().st_size for file in folder.glob("*.safetensors")) * bits // 12)
    with told("bitsandbytes cannot be imported", 'pip install "delta-llava[quantization]"'):
        import bitsandbytes  # noqa: F401 (transformers needs it)
    return known


def quantize(
    folder: Path,
    output: Path,
    bits: int = 4,
    base_model: str | None = None,
    repo_id: str | None = None,
    revision: str = DEFAULT_REVISION,
    device: str = "auto",
) -> Path:
    """Writes a quantised copy of a Hub folder: the language model in 4 (NF4) or 8 bit, all else in 16 bit.

    Args:
        folder: a Hub folder.
        output: new folder.
        bits: 4 or 8.
        base_model: Hub id of the unquantised model; by default what the source's card loads in its snippets.
        repo_id, revision: for the snippets of the new card.
        device: "auto", "cpu" or "cuda".

    Returns:
        `output`, which loads with plain `from_pretrained(..., trust_remote_code=True)` on CPU and GPU.

    Raises:
        UserError: bitsandbytes is missing, the source is no Delta-LLaVA folder or brings code that is not this
            package's, or `output` exists or is no place for a model.
    """
    folder, output = Path(folder), Path(output)
    base = _check(folder, output, bits, base_model, repo_id)
    import torch
    from transformers import BitsAndBytesConfig

    from modeling_delta_llava import DeltaLlavaForConditionalGeneration

    options = {"llm_int8_skip_modules": SKIP_MODULES}
    if bits == 4:
        options |= {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    else:
        options["load_in_8bit"] = True
    where = check_device(device)
    # With this package's code, whatever the folder holds.
    model = DeltaLlavaForConditionalGeneration.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(**options),
        device_map={"": where},
    )
    with atomic_folder(output) as building:
        # Everything but the weights is the source's, as far as a repository holds it; what saving writes goes on top.
        for path in list_files(folder, NOT_COPIED):
            if problem_of(folder, path) is None:
                (building / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / path, building / path)
        model.save_pretrained(building)
        config = read_json(building / "config.json")
        config.pop("_name_or_path", None)  # the source on this machine
        write_json(building / "config.json", config)
        write_card(building, repo_id=repo_id, revision=revision, base_models=[base], name=output.name)
    return output
