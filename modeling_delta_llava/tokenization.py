"""Tokenizers whose ids equal training's, token for token.

Training tokenises every chunk of text between images on its own with the slow sentencepiece tokenizer, so every chunk
starts with sentencepiece's dummy space. Here the rule is part of the fast tokenizer itself: the placeholder is matched
in normalised text, and a normaliser puts the dummy space behind it. A prompt therefore gets training's ids whoever
tokenises it: the processor, the pipeline, or a server that renders the chat template and tokenises the text itself.
"""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from delta_llava.errors import UserError, reason

from .json_files import check_file

SPACE = "▁"
# Far beyond any Llama-style model: the work grows with the pieces and with the square of their length.
MAX_PIECES, MAX_PIECE_LENGTH = 150_000, 256


def _load_sentencepiece(model_file: str | Path):
    """The sentencepiece model and its piece types, checked for its size and for what the fast tokenizer reproduces."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto

    check_file(Path(model_file))
    model, types = proto.ModelProto(), dict(proto.ModelProto.SentencePiece.Type.items())
    try:
        model.ParseFromString(Path(model_file).read_bytes())
    except DecodeError as error:
        raise UserError(
            f"{model_file} is not a sentencepiece model ({reason(error)}): give the tokenizer.model of training"
        ) from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    pieces = [piece.piece for piece in model.pieces]
    problem = None
    if trainer.model_type != proto.TrainerSpec.ModelType.BPE:
        problem = "is not of type BPE"
    elif normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.add_dummy_prefix:
        problem = "normalises text beyond escaping spaces and adding a dummy space"
    elif not trainer.byte_fallback:
        problem = "has no byte fallback"
    elif (
        len(model.pieces) > MAX_PIECES
        or max((len(piece.piece) for piece in model.pieces), default=0) > MAX_PIECE_LENGTH
    ):
        problem = f"has more than {MAX_PIECES:,} pieces, or one of more than {MAX_PIECE_LENGTH} characters"
    elif len(set(pieces)) < len(pieces):
        problem = "has a piece twice"
    elif types["UNKNOWN"] not in {piece.type for piece in model.pieces}:
        problem = "has no piece for what is unknown"
    elif not all(0 <= index < len(pieces) for index in (trainer.bos_id, trainer.eos_id)):
        problem = "has no pieces for begin and end of a text"
    if problem:
        raise UserError(f"the sentencepiece model {model_file} {problem}; only Llama-style models are supported")
    return model, types


def score_ordered_merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins into a third, best score of the joined piece first.

    Sentencepiece joins the adjacent pair whose union has the best score; a byte-pair tokenizer joins the pair that
    comes first in its list. Ordering by id, as transformers does without a `tokenizer.json`, differs for runs of
    spaces.
    """
    scores = dict(pieces)
    merges = []
    for piece, score in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, cut, left, right))
    merges.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in merges]


def sentencepiece_tokenizer(
    model_file: str | Path,
    legacy: bool = True,
    image_token: str = "<image>",
    pad_token: str = "<unk>",
    model_max_length: int | None = None,
    added_tokens: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """
    A fast tokenizer with the ids of the slow Llama tokenizer, applied to each chunk between images.

    Args:
        model_file: the sentencepiece `tokenizer.model`.
        legacy: the slow tokenizer's flag: whether text behind special tokens such as `</s>` also gets a dummy space.
        image_token: placeholder, appended to the vocabulary behind `added_tokens` unless it is one of them.
        pad_token: `<unk>` in LLaVA-1.5.
        model_max_length: context length of the language model.
        added_tokens: tokens training appended to the vocabulary, in order of their ids.

    Raises:
        UserError: if the sentencepiece model has features that a byte-pair tokenizer cannot reproduce.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    model, types = _load_sentencepiece(model_file)
    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    ordinary = [(piece.piece, piece.score) for piece in model.pieces if piece.type == types["NORMAL"]]
    unk_token = next(piece.piece for piece in model.pieces if piece.type == types["UNKNOWN"])
    control = [piece.piece for piece in model.pieces if piece.type == types["CONTROL"]]
    trainer = model.trainer_spec
    bos_token, eos_token = model.pieces[trainer.bos_id].piece, model.pieces[trainer.eos_id].piece

    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=score_ordered_merges(ordinary),
            unk_token=unk_token,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    appended = dict.fromkeys([*added_tokens, image_token])
    user_defined = [piece.piece for piece in model.pieces if piece.type == types["USER_DEFINED"]]
    # A dummy space behind every image whose next chunk is not empty, and behind a rendered BOS. In front of everything
    # else Metaspace puts it, except in front of a space, where the slow tokenizer has two.
    image, bos = _escape(image_token), _escape(bos_token)
    nothing = "|".join([*map(_escape, (unk_token, *control, *appended, *user_defined)), r"\z"])
    dummy_spaces = [
        (rf"{image}(?!{nothing})", image_token + SPACE),
        (rf"\A{bos}(?!{nothing})", bos_token + SPACE),
        (rf"\A[ {SPACE}]", SPACE * 2),
    ]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(pattern), content) for pattern, content in dummy_spaces]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme="always" if legacy else "first", split=False
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # A token that is not `normalized` cuts the text before the normaliser sees it, so that `\A` matches behind it too:
    # right in legacy mode, where the slow tokenizer puts its dummy space there as well.
    tokenizer.add_tokens([AddedToken(token, normalized=not legacy) for token in user_defined])
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=not legacy or token in (bos_token, image_token), special=True)
            for token in (unk_token, *control, *appended)
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos_token} $A",
        pair=f"{bos_token} $A {bos_token} $B",
        special_tokens=[(bos_token, vocabulary[bos_token])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=AddedToken(bos_token, normalized=True, special=True),
        eos_token=AddedToken(eos_token, normalized=not legacy, special=True),
        unk_token=AddedToken(unk_token, normalized=not legacy, special=True),
        pad_token=pad_token,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **({} if model_max_length is None else {"model_max_length": model_max_length}),
    )


def with_image_token(tokenizer: PreTrainedTokenizerFast, image_token: str, name: str) -> PreTrainedTokenizerFast:
    """The tokenizer with another name for its image token, whose own name is then text like any other.

    Args:
        tokenizer: a tokenizer of this package.
        image_token: the name it has.
        name: the name it gets: letters, and other characters that regular expressions take as they are.
    """
    from tokenizers import Tokenizer

    state = tokenizer.backend_tokenizer.to_str()
    for written in (_escape(image_token), image_token):  # in the normaliser's patterns, and everywhere else
        state = state.replace(json.dumps(written)[1:-1], name)
    special = ("bos_token", "eos_token", "unk_token", "pad_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(state),
        **{kind: getattr(tokenizer, kind) for kind in special},
        model_max_length=tokenizer.model_max_length,
    )


def _escape(token: str) -> str:
    """The token as a literal of the tokenizers library's regular expressions."""
    return "".join(character if character.isalnum() else f"\\{character}" for character in token)
