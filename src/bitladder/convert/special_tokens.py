"""Special tokens: which begin and end a text, and at which llama.cpp ends its answer.

A checkpoint names them by text in tokenizer_config.json (or special_tokens_map.json), and by id in config.json and
generation_config.json. transformers' tokenizer goes by the first, and generation by the last. llama.cpp has one file:
`eos` and `bos` are the tokenizer's, and every end token of any of the files ends an answer.
"""

import dataclasses
import pathlib
from typing import Any

from bitladder.convert.checkpoint_files import brief, read_json, read_optional, whole_number
from bitladder.convert.vocabulary import Kind, Vocabulary
from bitladder.progress import SILENT, Progress

TEMPLATE = "tokenizer.json's post_processor"
ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
# llama.cpp ends an answer at `eos`, `eot`, `eom` and at these three, which otherwise matter only to models that fill in
# text between two others. Source: llama-vocab.cpp.
END_ROLES = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# Texts by which llama.cpp recognises an end token. Source: llama-vocab.cpp.
KNOWN_ENDS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
    )
)
# The token that llama.cpp takes for `eos` where a file names none.
DEFAULT_EOS = {"gpt2": 11, "llama": 2}


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a GGUF.

    Parameters:
        ids: tokens by role; END_ROLES are among the roles.
        types: the types of all tokens; named special tokens are CONTROL.
        add_bos: whether `bos` goes before each text.
        add_eos: whether `eos` goes after each text.
    """

    ids: dict[str, int]
    types: list[int]
    add_bos: bool
    add_eos: bool


def read_special_tokens(folder: pathlib.Path, vocabulary: Vocabulary, progress: Progress) -> SpecialTokens:
    """The special tokens of a checkpoint.

    Parameters:
        folder: directory of the checkpoint.
        vocabulary: its vocabulary.
        progress: gets a warning for each token that cannot be used, and where files differ.

    Raises:
        BitladderError: config.json or tokenizer_config.json is malformed.
    """
    reader = _Reader(folder, vocabulary, progress)
    before, after = vocabulary.before, vocabulary.after
    ids: dict[str, int] = {}
    for role in ROLES:
        places = {
            TEMPLATE: before[:1] if role == "bos" and before else [],
            TOKENIZER: reader.named(role),
            CONFIG: reader.numbers(CONFIG, role),
            "tokenizer.model": reader.default(role),
        }
        if role == "bos":
            reader.compare_bos(places)
        token = next((tokens[0] for tokens in places.values() if tokens), None)
        if token is not None and role != "eos":
            ids[role] = token
    ends = reader.ends(after[-1:] if after else [])
    add_bos, add_eos = reader.adds("bos", before), reader.adds("eos", after)
    if add_bos and "bos" not in ids:
        progress.warn("the tokenizer adds a bos token but does not say which; none will be added")
    types = list(vocabulary.types)
    for token in {*reader.special(), *(before or ()), *(after or ())}:
        if types[token] in (Kind.NORMAL, Kind.USER_DEFINED):  # transformers takes what has a role for special
            types[token] = int(Kind.CONTROL)
    ids |= reader.roles_of(ends)
    return SpecialTokens(ids, types, add_bos and "bos" in ids, add_eos and "eos" in ids)


class _Reader:
    """The files of a checkpoint that name special tokens, and its vocabulary."""

    def __init__(self, folder: pathlib.Path, vocabulary: Vocabulary, progress: Progress) -> None:
        self.vocabulary, self.progress = vocabulary, progress
        self.files = {
            name: read_json(folder / name) if (folder / name).is_file() else {}
            for name in (CONFIG, TOKENIZER, "special_tokens_map.json")
        }
        self.files[GENERATION] = read_optional(folder / GENERATION, SILENT)  # sampling defaults were warned of
        self.texts = {text: i for i, text in enumerate(vocabulary.tokens) if vocabulary.types[i] != Kind.UNUSED}
        names = self.files[TOKENIZER]
        if "added_tokens_decoder" not in names:  # so does transformers
            names = names | self.files["special_tokens_map.json"]
        self._named = {role: self._tokens_of(role, names.get(f"{role}_token")) for role in ROLES}
        self._numbers = {
            (name, role): self._read_numbers(name, role)
            for name, role in [*((CONFIG, role) for role in ROLES), (GENERATION, "eos")]
        }

    def named(self, role: str) -> list[int]:
        """The tokens that tokenizer_config.json gives a role."""
        return self._named[role]

    def special(self) -> set[int]:
        """The tokens to which tokenizer_config.json gives any role."""
        return {token for tokens in self._named.values() for token in tokens}

    def numbers(self, file: str, role: str) -> list[int]:
        """The tokens to which config.json or generation_config.json gives a role."""
        return self._numbers[file, role]

    def default(self, role: str) -> list[int]:
        """The tokens to which the vocabulary's own file gives a role."""
        return [self.vocabulary.ids[role]] if role in self.vocabulary.ids else []

    def shown(self, token: int) -> str:
        """A token for a message."""
        return f"{token} {brief(self.vocabulary.tokens[token])}"

    def compare_bos(self, places: dict[str, list[int]]) -> None:
        """Warns if two places name different bos tokens; the first one is taken."""
        stated = [(place, tokens[0]) for place, tokens in places.items() if tokens and place != "tokenizer.model"]
        for place, token in stated[1:]:
            if token != stated[0][1]:
                self.progress.warn(
                    f"the bos token is {self.shown(stated[0][1])} by {stated[0][0]}, which transformers' tokenizer goes"
                    f" by and which is taken, and {self.shown(token)} by {place}"
                )
        if self.vocabulary.before and len(self.vocabulary.before) > 1:
            tokens = ", ".join(map(self.shown, self.vocabulary.before))
            self.progress.warn(f"the tokenizer begins each text with {tokens}; llama.cpp adds only the first")

    def ends(self, added: list[int]) -> list[int]:
        """All end tokens, `eos` first; `added` is the one that the tokenizer puts after each text, if any."""
        places = {
            TEMPLATE: added,
            TOKENIZER: self.named("eos"),
            GENERATION: self.numbers(GENERATION, "eos"),
            CONFIG: self.numbers(CONFIG, "eos"),
        }
        stated = {place: tokens for place, tokens in places.items() if tokens}
        # Generation goes by one of these two. A token that only another file names would not end an answer there.
        decides = next((place for place in (GENERATION, CONFIG) if place in stated), None)
        for place, tokens in stated.items():
            others = [token for token in tokens if decides and token not in stated[decides]]
            if decides and others:
                self.progress.warn(
                    f"{place} names the end token {self.shown(others[0])}, {decides}"
                    f" {', '.join(map(self.shown, stated[decides]))}; llama.cpp will end at each of them"
                )
        ends = list(dict.fromkeys(token for tokens in stated.values() for token in tokens)) or self.default("eos")
        if not ends:
            default = DEFAULT_EOS.get(self.vocabulary.model, len(self.vocabulary.tokens))
            instead = self.shown(default) if default < len(self.vocabulary.tokens) else "none"
            self.progress.warn(
                f"no end token is named ({TOKENIZER}, {GENERATION}, {CONFIG}); llama.cpp takes token {instead} for it,"
                " and answers may not end"
            )
        by_name = [token for text, token in self.texts.items() if text in KNOWN_ENDS and token not in ends]
        if by_name:
            self.progress.info(
                f"llama.cpp also ends answers at {', '.join(map(self.shown, by_name))}, by the name alone"
            )
        return ends

    def roles_of(self, ends: list[int]) -> dict[str, int]:
        """The roles in which llama.cpp ends an answer at these tokens.

        Those whose texts it knows need none, but get `eot` or `eom`. A warning names what has no place.
        """
        if not ends:
            return {}
        roles = {"eos": ends[0]}
        texts = {token: self.vocabulary.tokens[token] for token in ends[1:]}
        for token, text in texts.items():
            if text in KNOWN_ENDS:
                roles.setdefault("eom" if text == "<|eom_id|>" else "eot", token)
        unknown = [token for token, text in texts.items() if text not in KNOWN_ENDS]
        free = [role for role in END_ROLES if role not in roles]
        roles |= dict(zip(free, unknown, strict=False))
        for token in unknown[len(free) :]:
            self.progress.warn(f"llama.cpp cannot hold another end token: answers will not end at {self.shown(token)}")
        return roles

    def adds(self, role: str, place: list[int] | None) -> bool:
        """Whether a bos or eos token is added: by tokenizer.json, or without that by tokenizer_config.json."""
        key = f"add_{role}_token"
        flag = self.files[TOKENIZER].get(key)
        if flag is not None and not isinstance(flag, bool):
            self.progress.warn(f"{TOKENIZER}: {key} should be true or false, not {brief(flag)}; it is left out")
            flag = None
        if place is None:
            return flag if flag is not None else role == "bos"
        if flag is not None and flag != bool(place):
            self.progress.warn(
                f"{TOKENIZER} says {key} = {str(flag).lower()}, but by {TEMPLATE}"
                f" {'one' if place else 'none'} is added; that counts, as in transformers"
            )
        return bool(place)

    def _tokens_of(self, role: str, value: Any) -> list[int]:
        """The ids of a token that is named by its text, or of a list of them."""
        ids = []
        for entry in value if isinstance(value, list) else [value]:
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str) and text in self.texts:
                ids.append(self.texts[text])
            elif text is not None:
                what = "is not in the vocabulary" if isinstance(text, str) else "is no text of a token"
                self.progress.warn(f"{TOKENIZER}: {role}_token {brief(text)} {what}; it is left out")
        return ids

    def _read_numbers(self, file: str, role: str) -> list[int]:
        """The ids of `ROLE_token_id` in a file that are tokens of the vocabulary."""
        key = f"{role}_token_id"
        value = self.files[file].get(key)
        ids = []
        for entry in value if isinstance(value, list) else [value]:
            number = whole_number(entry)
            if number is not None and 0 <= number < len(self.vocabulary.tokens):
                ids.append(number)
            elif entry is not None:
                self.progress.warn(f"{file}: {key} {brief(entry)} is no token of the vocabulary; it is left out")
        return ids
