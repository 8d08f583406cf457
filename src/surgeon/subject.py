"""Where the subject of a prompt lies among its tokens, and which tokens a target is made of.

Both are read off the tokenizer's offsets. Lengths of pieces tokenised apart do not add up: a piece
is often tokenised differently inside a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers

from .corpus import bos_ids
from .errors import BadInput

SLOT = "{}"
_OPENING = tuple("([{\"'“‘«¿¡")

Offsets = list[tuple[int, int]]  # of each token: its first character, and the one after its last


@dataclass(frozen=True)
class SubjectPrompt:
    """A prompt as ids, and the range of them that is the subject.

    ids: with BOS if the policy says so. start, stop: the subject is `ids[start:stop]`. tokens: one
    text for each id. warnings: sentences about a subject that is split oddly or stands there twice.
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
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: str,
    subject: str,
    bos: str = "auto",
    prefix: str = "",
) -> SubjectPrompt:
    """Tokenise `prefix` + `prompt` and say which tokens are the subject.

    The subject stands where the prompt has `{}`, or else where the prompt holds its text.
    Raises: BadInput for an empty subject, one that is not in the prompt, several `{}`, or a
    tokenizer without offsets.

    >>> import surgeon
    >>> tokenizer = surgeon.load_model("patient").tokenizer
    >>> prompt = locate(tokenizer, "The capital of {} is", "France")
    >>> prompt.text, prompt.subject_tokens, prompt.last
    ('The capital of France is', (' France',), 4)
    """
    if not subject.strip():
        raise BadInput(
            "the subject is empty; give the words that the fact is about, like 'Eiffel Tower'."
        )
    if subject != subject.strip():
        raise BadInput(f"the subject {subject!r} begins or ends with white space; give it without.")
    begin, warnings = _subject_begin(prompt, subject)
    if prompt[-1:].isspace():
        warnings.append(
            f"the prompt {prompt!r} ends in white space, which may be a token of its own;"
            " leave it out."
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
    texts = _texts(tokenizer, text, ids, offsets)
    before = text[offsets[first][0] : begin]
    after = text[end : offsets[last][1]]
    for place, characters in ((first, before), (last, after)):
        if characters.strip():
            warnings.append(
                f"the token {texts[place]!r} holds a part of the subject {subject!r} and"
                f" {characters.strip()!r} beside it; its state is not the subject's alone."
            )

    head = bos_ids(tokenizer, bos)
    head_texts = [str(tokenizer.convert_ids_to_tokens(i)) for i in head]
    return SubjectPrompt(
        text,
        subject,
        ids=(*head, *ids),
        tokens=(*head_texts, *texts),
        start=len(head) + first,
        stop=len(head) + last + 1,
        bos=bool(head),
        warnings=tuple(warnings),
    )


def target_ids(
    tokenizer: transformers.PreTrainedTokenizerBase, prompt: str, target: str
) -> list[int]:
    """The ids of `target` as they follow `prompt`.

    One space stands between them, unless the target brings white space, or the prompt ends in it
    or in an opening bracket or quote.
    Raises: BadInput for an empty target.

    >>> import surgeon
    >>> tokenizer = surgeon.load_model("patient").tokenizer
    >>> tokenizer.decode(target_ids(tokenizer, "The capital of France is", "Rome"))
    ' Rome'
    """
    if not target.strip():
        raise BadInput(
            "the target is empty; give the word or words that the model should say, like Rome."
        )
    glued = target[0].isspace() or prompt[-1:].isspace() or prompt.endswith(_OPENING)
    space = "" if glued else " "
    before, _ = _encode(tokenizer, prompt)
    whole, offsets = _encode(tokenizer, prompt + space + target.rstrip())
    if whole[: len(before)] == before:
        return whole[len(before) :]
    # the tokenizer joins the end of the prompt with the target; tokens that begin in the target
    # are still its own
    own = [i for i, (a, _) in zip(whole, offsets, strict=True) if a >= len(prompt)]
    if not own:
        raise BadInput(
            f"the tokenizer makes one token of the end of {prompt!r} and the target {target!r};"
            " change the prompt's end."
        )
    return own


def _subject_begin(prompt: str, subject: str) -> tuple[int, list[str]]:
    """Where the subject begins, in characters, and what is odd about that."""
    slots = prompt.count(SLOT)
    if slots > 1:
        raise BadInput(
            f"the prompt {prompt!r} holds {slots} times {{}}; mark one place for the subject."
        )
    if slots == 1:
        return prompt.index(SLOT), []
    times = prompt.count(subject)
    if times == 0:
        raise BadInput(
            f"the subject {subject!r} is not in the prompt {prompt!r};"
            " write it as it stands there, or mark its place {}."
        )
    warnings = []
    if times > 1:
        warnings.append(
            f"the subject {subject!r} stands {times} times in the prompt;"
            " the first is meant, unless {} marks another."
        )
    return prompt.index(subject), warnings


def _encode(
    tokenizer: transformers.PreTrainedTokenizerBase, text: str
) -> tuple[list[int], Offsets]:
    if not text:
        return [], []
    if not tokenizer.is_fast:
        raise BadInput(
            f"{type(tokenizer).__name__} gives no offsets of its tokens;"
            " use the model's fast tokenizer (tokenizer.json)."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded.input_ids), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]


def _texts(
    tokenizer: transformers.PreTrainedTokenizerBase, text: str, ids: list[int], offsets: Offsets
) -> list[str]:
    """Each token as it stands in the text, with the white space before it."""
    texts = []
    end = 0
    for i, (a, b) in zip(ids, offsets, strict=True):
        only_space_between = not text[end:a].strip()
        if b > end and only_space_between:
            texts.append(text[end:b])
        else:  # one of several pieces of a character, say
            texts.append(str(tokenizer.decode([i])))
        end = max(end, b)
    return texts
