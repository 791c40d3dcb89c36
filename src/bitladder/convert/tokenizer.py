"""The vocabulary of a checkpoint, whichever tokenizer it has."""

import pathlib

from bitladder.convert.bpe import read_bpe
from bitladder.convert.checkpoint import read_json
from bitladder.convert.pretokenizers import is_byte_level
from bitladder.convert.sentencepiece import read_byte_fallback, read_sentencepiece
from bitladder.convert.vocabulary import Vocabulary
from bitladder.errors import BitladderError
from bitladder.progress import SILENT, Progress


def read_vocabulary(folder: pathlib.Path, size: int, progress: Progress = SILENT) -> Vocabulary:
    """Reads the vocabulary of a checkpoint.

    The first of these is read: tokenizer.json with byte-level BPE, tokenizer.model of SentencePiece, tokenizer.json
    with SentencePiece BPE in transformers' form.

    Parameters:
        folder: directory of the checkpoint.
        size: tokens of the embeddings.
        progress: gets warnings.

    Raises:
        BitladderError: there is none of them, or llama.cpp cannot reproduce the tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            return read_sentencepiece(folder, size, progress)
        hint = "; transformers' AutoTokenizer can write one (save_pretrained)" if any(folder.glob("vocab.*")) else ""
        raise BitladderError(f"{folder} has neither tokenizer.json nor tokenizer.model{hint}")
    tokenizer = read_json(path)
    model, before = tokenizer.get("model"), tokenizer.get("pre_tokenizer")
    kind = model.get("type", "BPE" if "merges" in model else None) if isinstance(model, dict) else None
    try:
        if isinstance(model, dict) and kind == "BPE":
            if is_byte_level(before):
                return read_bpe(folder, tokenizer, size, progress)
            if (folder / "tokenizer.model").is_file():
                return read_sentencepiece(folder, size, progress)
            if model.get("byte_fallback"):
                return read_byte_fallback(folder, tokenizer, size, progress)
    except (AttributeError, KeyError, TypeError) as error:
        raise BitladderError(f"{path} is not a tokenizer.json that can be read: {error!r}") from error
    described = before.get("type") if isinstance(before, dict) else before
    raise BitladderError(
        f"{path}: a {kind} tokenizer with the pre-tokenizer {described} is not one that bitladder converts (byte-level"
        " BPE, SentencePiece BPE); --converter PATH runs llama.cpp's own convert_hf_to_gguf.py instead"
    )
