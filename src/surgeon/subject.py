"""Where the subject of a prompt lies among its tokens, by offset mapping, and which tokens a target
is made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .corpus import bos_ids
from .errors import BadInput

SLOT = "{}"
_OPENING = tuple("([{\"'“‘«¿¡")


@dataclass(frozen=True)
class SubjectPrompt:
    """A prompt as ids, and the range of them that is the subject.

    ids: BOS included under the policy; start, stop: the subject is `ids[start:stop]`; tokens: one
    text for each id; warnings: sentences about a subject that is split oddly, or stands there
    twice.
    """

    text: str
    subject: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    start: int
    stop: int
    bos: bool
    warnings: tuple[str, ...] = ()

    @property
    def last(self) -> int:
        """Position of the subject's last token."""
        return self.stop - 1

    @property
    def position_zero(self) -> bool:
        """Whether nothing but BOS stands before the subject."""
        return self.start == int(self.bos)

    @property
    def subject_tokens(self) -> tuple[str, ...]:
        return self.tokens[self.start : self.stop]

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt": self.text,
            "tokens": list(self.tokens),
            "subject_range": [self.start, self.stop],
            "warnings": list(self.warnings),
        }


def locate(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    subject: str,
    bos: str = "auto",
    prefix: str = "",
) -> SubjectPrompt:
    """Tokenise `prefix` + `prompt` and find the subject: where `{}` stands in the prompt, else
    where the subject's text stands.

    Raises: BadInput for an empty subject, one that is not in the prompt, several `{}`, or a
    tokenizer without offsets.
    """
    if not subject.strip():
        raise BadInput(
            "the subject is empty; give the words that the fact is about, like --subject 'Eiffel"
            " Tower'."
        )
    if subject != subject.strip():
        raise BadInput(f"the subject {subject!r} begins or ends with white space; give it without.")
    begin, warnings = _find(prompt, subject)
    if prompt[-1:].isspace():
        warnings.append(
            f"the prompt {prompt!r} ends in white space, which may be a token of its own; leave it"
            " out."
        )
    text = prefix + prompt.replace(SLOT, subject)
    begin += len(prefix)
    end = begin + len(subject)
    ids, offsets = _encode(tokenizer, text)
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > begin]
    if not inside:
        raise BadInput(
            f"no token of {text!r} belongs to the subject {subject!r}; this tokenizer drops its"
            " characters, so choose another."
        )
    first, last = inside[0], inside[-1]
    head = bos_ids(tokenizer, bos)
    tokens = (
        *(str(tokenizer.convert_ids_to_tokens(i)) for i in head),
        *_texts(tokenizer, text, ids, offsets),
    )
    for place, outside in (
        (first, text[offsets[first][0] : begin]),
        (last, text[end : offsets[last][1]]),
    ):
        if outside.strip():
            warnings.append(
                f"the token {tokens[len(head) + place]!r} holds a part of the subject {subject!r}"
                f" and {outside.strip()!r} beside it; its state is not the subject's alone."
            )
    return SubjectPrompt(
        text,
        subject,
        (*head, *ids),
        tokens,
        len(head) + first,
        len(head) + last + 1,
        bool(head),
        tuple(warnings),
    )


def target_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> list[int]:
    """The ids of `target` as they follow `prompt`: after one space, unless the target brings white
    space or the prompt ends in it.

    Raises: BadInput for an empty target.
    """
    if not target.strip():
        raise BadInput(
            "the target is empty; give the word or words that the model should say, like --target"
            " Rome."
        )
    glued = target[0].isspace() or prompt[-1:].isspace() or prompt.endswith(_OPENING)
    text = prompt + ("" if glued else " ") + target.rstrip()
    before = _encode(tokenizer, prompt)[0]
    whole, offsets = _encode(tokenizer, text)
    if whole[: len(before)] == before:
        return whole[len(before) :]
    # the tokenizer joins the end of the prompt with the target; the tokens that begin in the target
    # are still its own
    own = [i for i, (a, _) in zip(whole, offsets, strict=True) if a >= len(prompt)]
    if not own:
        raise BadInput(
            f"the tokenizer makes one token of the end of {prompt!r} and the target {target!r};"
            " change the prompt's end."
        )
    return own


def _find(prompt: str, subject: str) -> tuple[int, list[str]]:
    """Where the subject begins, in characters, and what is odd about that."""
    slots = prompt.count(SLOT)
    if slots > 1:
        raise BadInput(
            f"the prompt {prompt!r} holds {slots} times {{}}; mark one place for the subject."
        )
    if slots == 1:
        return prompt.index(SLOT), []
    if subject not in prompt:
        raise BadInput(
            f"the subject {subject!r} is not in the prompt {prompt!r}; write it as it stands there,"
            " or mark its place {}."
        )
    often = prompt.count(subject)
    twice = (
        f"the subject {subject!r} stands {often} times in the prompt; the first is meant, unless"
        " {} marks another."
    )
    return prompt.index(subject), [twice] if often > 1 else []


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    if not text:
        return [], []
    if not tokenizer.is_fast:
        raise BadInput(
            f"{type(tokenizer).__name__} gives no offsets of its tokens; use the model's fast"
            " tokenizer (tokenizer.json)."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded.input_ids), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]


def _texts(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], offsets: list[tuple[int, int]]
) -> list[str]:
    """Each token as it stands in the text, with the white space before it; pieces of one character
    as the tokenizer writes them.
    """
    texts, end = [], 0
    for i, (a, b) in zip(ids, offsets, strict=True):
        texts.append(
            text[end:b] if b > end and not text[end:a].strip() else str(tokenizer.decode([i]))
        )
        end = max(end, b)
    return texts
