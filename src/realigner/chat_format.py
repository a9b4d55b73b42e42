"""Conversations as a host's tokens: by its tokenizer's chat template, or in the paper's plain form.

This is the one way from messages to tokens; training, answering, traces and serving all take it. The text is what
``apply_chat_template`` renders and tokenises; marks of the template that somebody wrote into a message are text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from inspect import signature
from typing import Any

from realigner.errors import RealignerError, UsageError
from realigner.prompts import Message, Prompt, check_message, messages_of
from realigner.thoughts import ThoughtTags, tags_of, templates_of

IGNORED = -100  # the label PyTorch's cross-entropy leaves out
TEMPLATES = ("chat", "plain")
PLAIN_NOTE = "the host has no chat template: prompts are in the plain form (the question, three spaces, the reply)"
WITHOUT_THOUGHT = {"enable_thinking": False}  # the template variable that hosts which think have for it
THOUGHT_NOTE = (
    "the host thinks before it replies, and the rows have no thoughts: their replies are learned after an empty one; to train "
    'and answer without thoughts, set chat_template_kwargs to {"enable_thinking": false}'
)

_PROBE, _OTHER = "zxqvj", "Kw3#Y"  # messages that occur in no chat template, no character of one in the other
_MOST_KWARGS = 1 << 16  # characters of chat_template_kwargs as JSON
_OWN = {  # what apply_chat_template takes besides the template's variables, and is not the user's to set
    *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding"),
    *("sanitize_control_tokens", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    "tokenizer_kwargs",
}
_SHOWN = 40  # characters of a text in a message
_WINDOW = 32  # tokens at a prompt's end in which an opened thought is looked for
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class ChatFormat:
    """How conversations become tokens on one host.

    Args:
        tokenizer: the host's.
        template: ``"chat"``, the host's chat template; or ``"plain"``, the question and three spaces, as in the paper. A
            tokenizer without a chat template has the plain form only.
        chat_template_kwargs: variables of the template, such as ``{"enable_thinking": False}``.

    Raises:
        UsageError: for variables that are not a template's.

    Example:
        >>> chat_format = ChatFormat(tokenizer)  # doctest: +SKIP
        >>> tokenizer.decode(chat_format.prompts(["Why is the sky blue?"])[0])  # doctest: +SKIP
        '<|im_start|>user\\nWhy is the sky blue?<|im_end|>\\n<|im_start|>assistant\\n'
    """

    def __init__(self, tokenizer: Any, template: str = "chat", chat_template_kwargs: Mapping[str, Any] | None = None) -> None:
        check_template_kwargs(chat_template_kwargs)
        self.tokenizer = tokenizer
        self.is_plain = template == "plain" or not has_chat_template(tokenizer)
        self.kwargs = dict(chat_template_kwargs or {})
        unknown = next((name for name in self.kwargs if name not in WITHOUT_THOUGHT and not self._has_variable(name)), None)
        if unknown is not None:
            raise UsageError(f"chat_template_kwargs: the host's chat template has no variable {unknown!r}")
        self._sees: dict[tuple[str, bool], bool] = {}  # (role, first message) -> whether the template writes such a message

    # Prompts.

    def prompts(self, conversations: Sequence[Prompt], system: str | None = None) -> list[list[int]]:
        """The tokens of each conversation up to where the reply begins.

        Args:
            conversations: questions, or lists of messages of which the user's (or a tool's) is the last.
            system: a system prompt, put before each.

        Raises:
            UsageError: for an empty prompt, what is not a list of messages, or several messages in the plain form.
            RealignerError: when the host's chat template refuses a conversation, or leaves out what somebody says in it.
        """
        return [self._prompt(messages_of(conversation, system)) for conversation in conversations]

    def text_prompt(self, text: str) -> list[int]:
        """The tokens of a text that a host goes on with: what the tokenizer puts before every text, and nothing after it."""
        return self._before + self._text_ids(text)

    def turns(self, conversation: Prompt, system: str | None = None) -> list[int]:
        """For each token of the prompt, the number of the message whose content it is of; -1: the template's own.

        A token belongs to a message when it changes with its content. The system prompt, if given, is message 0.
        """
        messages = messages_of(conversation, system)
        ids = self._prompt(messages)
        turns = [-1] * len(ids)
        for number, message in enumerate(messages):
            for probe in (_PROBE, _OTHER):  # whatever the content begins and ends with, one of them does not
                changed = self._prompt([*messages[:number], {**message, "content": probe}, *messages[number + 1 :]])
                same = min(len(ids), len(changed))
                start = next((at for at in range(same) if ids[at] != changed[at]), same)
                after = next((at for at in range(same - start) if ids[-1 - at] != changed[-1 - at]), same - start)
                turns[start : len(ids) - after] = [number] * (len(ids) - after - start)
        return turns

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        if self.is_plain:
            if len(messages) > 1:
                raise UsageError("prompt: the plain form has no turns and no system prompt; give one question")
            return self._before + self._plain_ids(messages[0]["content"] + "   ")
        self._check_roles(messages)
        ids = self._ids(messages, reply_next=True)
        unheard = self.tags is not None and not self._has_variable("enable_thinking")
        if self.kwargs.get("enable_thinking") is False and (unheard or self.opens_thought(ids)):
            # The template has no such variable: a reply without a thought is preceded by what it writes in whole conversations.
            probe = self._ids([*messages, {"role": "assistant", "content": _PROBE}])
            before, found, _ = self.decode(probe).rpartition(_PROBE)
            if found and not self.opens_thought(ids) and not before.removeprefix(self.decode(ids)).strip():
                return ids  # nothing is written before it
            kept = self._cut(probe, before)
            if not found or kept is None:
                raise RealignerError("the host's chat template has no prompt for a reply without a thought (enable_thinking)")
            return probe[:kept]
        return ids

    def _has_variable(self, name: str) -> bool:
        """Whether a variable is in the template; True where there is no template to look into."""
        texts = [] if self.is_plain else templates_of(self.tokenizer)
        return not texts or any(re.search(rf"\b{re.escape(name)}\b", text) for text in texts)

    # Whole conversations, to train on.

    def examples(
        self, conversation: Sequence[Message], loss_on: str = "reply", loss_on_thought: bool = False
    ) -> list[dict[str, list[int]]]:
        """A conversation that ends in a reply as tokens to train on: ``input_ids`` and ``labels``.

        The tokens are those of the template, and begin with exactly the prompt that `prompts` gives for the conversation
        without its reply. Labels are -100 where there is no loss. A reply's end token belongs to it; what the template writes
        after that does not. Where the template ends replies with no special token, the tokenizer's end token is added.

        Args:
            conversation: messages, the assistant's last.
            loss_on: ``"reply"``: the last one; ``"assistant"``: each of the assistant's messages; ``"text"``: everything.
            loss_on_thought: the thought before a reply counts too, on hosts that think.

        Returns:
            One example; or several with ``"assistant"``, where the template writes a turn in another way once it is not the
            last (thoughts are left out, say): then each turn is an example as it was when it was the last.

        Raises:
            RealignerError: when the template refuses the conversation, or what it renders does not begin with the prompt.
        """
        if loss_on != "assistant" or self.is_plain:
            return [self._example(conversation, loss_on, loss_on_thought)]
        found: list[dict[str, list[int]]] = []
        for number, message in enumerate(conversation):
            if message["role"] != "assistant" or not any(m["role"] == "user" for m in conversation[:number]):
                continue
            example = self._example(conversation[: number + 1], "reply", loss_on_thought)
            if found and example["input_ids"][: len(found[-1]["input_ids"])] == found[-1]["input_ids"]:
                earlier = found.pop()["labels"]
                example["labels"][: len(earlier)] = earlier
            found.append(example)
        if not found:
            raise RealignerError("the conversation has no reply to a message of the user")
        return found

    def _example(self, conversation: Sequence[Message], loss_on: str, loss_on_thought: bool) -> dict[str, list[int]]:
        if len(conversation) > 1 and conversation[-2].get("role") == "assistant":
            raise RealignerError(
                "the conversation has two replies of the assistant one after the other; join them, or leave one out"
            )
        prompt = self._prompt(messages_of(conversation[:-1]))
        check_message(conversation[-1])
        if self.is_plain:
            ids = prompt + self._plain_ids(conversation[-1]["content"])
        else:
            self._check_roles(conversation)
            ids = self._continued(prompt, self._ids(conversation), conversation[-1])
        start = len(prompt)
        if not loss_on_thought:
            start += self.thought_length(ids[start:], self.opens_thought(prompt))
        if conversation[-1].get("reasoning_content", "").strip() and not self._writes_thought(conversation):
            raise RealignerError(
                "the host's chat template leaves out the reply's thought (reasoning_content); leave it out of the row"
            )
        stop = None if self.is_plain else self._end(ids)
        if stop is None:
            if not self.is_plain and self._tail:
                raise RealignerError("the host's chat template does not end this reply as it ends others")
            ids = ids + self.ends
            stop = len(ids)
        first = 0 if loss_on == "text" else start
        return {"input_ids": ids, "labels": [IGNORED] * first + ids[first:stop] + [IGNORED] * (len(ids) - stop)}

    def _continued(self, prompt: list[int], whole: list[int], reply: Message) -> list[int]:
        """The whole conversation as a continuation of the prompt, token by token."""
        if whole[: len(prompt)] == prompt:
            return whole
        asked, text = self.decode(prompt), self.decode(whole)
        if text.startswith(asked):  # a token of the whole lies across the prompt's end; generation begins within it
            count = bisect_left(range(len(whole) + 1), len(asked), key=lambda n: len(self.decode(whole[:n])))
            across = self.decode(whole[:count])[len(asked) :]
            ids = prompt + self._text_ids(across) + whole[count:]
            if self.decode(ids) == text:
                return ids
        elif self.tags is not None and self.opens_thought(prompt):
            return prompt + self._after_opened(asked[asked.rindex(self.tags.open) :], self.tags, whole, reply["content"])
        at = next((n for n, (a, b) in enumerate(zip(asked, text, strict=False)) if a != b), min(len(asked), len(text)))
        raise RealignerError(
            "the host's chat template renders the prompt of a reply in another way than the conversation with the reply: "
            f"{asked[at : at + _SHOWN]!r} in the prompt is {text[at : at + _SHOWN]!r} there"
        )

    def _after_opened(self, opened: str, tags: ThoughtTags, whole: list[int], reply: str) -> list[int]:
        """The tokens of a reply after the thought that its prompt opens, where whole conversations have no thoughts."""
        thought, closed, rest = reply.removeprefix(opened).partition(tags.close)
        if not reply.startswith(opened) or not closed:
            raise RealignerError(
                f"the host's chat template begins a reply with a thought ({opened.strip()}) and writes none in whole "
                f'conversations; train without thoughts (chat_template_kwargs={{"enable_thinking": false}}), or give '
                f"replies that begin with {opened!r}"
            )
        if mark := self._marks.search(thought) or self._marks.search(rest):
            raise RealignerError(
                f"the reply has {mark[0]!r} in it, a token of the host's; the template leaves thoughts out, so that it cannot "
                "tell this one from its own: spell it another way"
            )
        stop = self._end(whole)
        return self._text_ids(thought + closed + rest) + ([] if stop is None else whole[stop - 1 :])

    # Thoughts.

    @cached_property
    def tags(self) -> ThoughtTags | None:
        """The tags around the host's reasoning; None if it is not a reasoning model."""
        return None if self.is_plain else tags_of(self.tokenizer)

    def skips_thought(self, conversation: Sequence[Message]) -> bool:
        """Whether the last reply stands after an empty thought, where the host that is asked for it would think first."""
        reply = conversation[-1]
        if self.tags is None or self.kwargs.get("enable_thinking") is False:
            return False
        if reply.get("reasoning_content") or self.tags.close in reply["content"]:
            return False
        prompt, ids = self._prompt(messages_of(conversation[:-1])), self._example(conversation, "reply", False)["input_ids"]
        return self.thought_length(ids[len(prompt) :], self.opens_thought(prompt)) > 0

    def opens_thought(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends in an opened thought, so that the host goes on with it."""
        return self.tags is not None and self.decode(prompt[-_WINDOW:]).rstrip().endswith(self.tags.open)

    def split(self, ids: Sequence[int], opened: bool) -> tuple[str, str]:
        """Thought and reply in the tokens that a host generated, as texts without special tokens.

        Args:
            ids: the tokens.
            opened: the prompt ends in an opened thought (`opens_thought`).
        """
        thought, reply = self.split_with_blanks(ids, opened)
        return thought, reply.strip()

    def split_with_blanks(self, ids: Sequence[int], opened: bool) -> tuple[str, str]:
        """As `split`, the reply with the blanks that the host wrote before and after it."""
        tags, length = self.tags, self.thought_length(ids, opened)
        reply = str(self.tokenizer.decode(ids[length:], skip_special_tokens=True))
        if tags is None:
            return "", reply
        if length:
            thought = self.decode(ids[:length]).strip().removesuffix(tags.close).removesuffix(tags.before_close)
            return thought.removeprefix(tags.open).strip(), reply
        begun = self.decode(ids).lstrip().startswith(tags.open)
        if not begun and not opened:
            return "", reply
        start = bisect_left(range(len(ids)), True, key=lambda n: tags.open in self.decode(ids[:n])) if begun else 0
        return str(self.tokenizer.decode(ids[start:], skip_special_tokens=True)).strip(), ""  # it is still thinking

    def may_be_tag(self, text: str) -> bool:
        """Whether what a host begins with may become one of its tags; until then it is neither thought nor reply."""
        tags = () if self.tags is None else (self.tags.open, self.tags.close)
        return any(tag.startswith(text) and tag != text for tag in tags)

    def thought_length(self, ids: Sequence[int], opened: bool) -> int:
        """How many tokens the thought at the beginning of a reply takes, with its tags and the blanks after them."""
        if self.tags is None:
            return 0
        text = self.decode(ids)
        if self.tags.close not in text or not (opened or text.lstrip().startswith((self.tags.open, self.tags.close))):
            return 0
        close = self.tags.close
        length = bisect_left(range(1, len(ids) + 1), True, key=lambda n: close in self.decode(ids[:n])) + 1
        while length < len(ids) and self.decode(ids[length : length + 1]).isspace():
            length += 1
        return length

    def _thoughts_apart(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Messages whose thoughts the template knows for thoughts, though marks within a content are text.

        A thought in an assistant's content is put where it has no tags: in the field that is for it, or away if the template
        leaves it out; whichever gives the text that the template makes of the content as it is.
        """
        if self.tags is None or not any(m["role"] == "assistant" and self.tags.close in m["content"] for m in messages):
            return messages
        asked = self._rendered(self._shaped(messages))
        for with_thought in (True, False):
            apart = [self._thought_apart(message, self.tags, with_thought) for message in messages]
            if self._rendered(self._shaped(apart)) == asked:
                return apart
        return messages

    def _thought_apart(self, message: Message, tags: ThoughtTags, with_thought: bool) -> Message:
        content = message["content"]
        if message["role"] != "assistant" or tags.close not in content or "reasoning_content" in message:
            return message
        rest = content.split(tags.close)[-1]
        if not with_thought:
            return {**message, "content": rest}
        thought = content.split(tags.close)[0].split(tags.open)[-1].strip("\n")
        return {**message, "reasoning_content": thought, "content": rest.lstrip("\n")}

    # Tokens.

    @cached_property
    def ends(self) -> list[int]:
        """The token that ends a reply, in a list: the template's end of a turn, else the tokenizer's end token, if any."""
        if not self.is_plain and self._tail:
            return self._tail[:1]
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    @cached_property
    def _tail(self) -> list[int]:
        """What the template writes after the last reply, from its first special token on; empty if there is none."""
        ids = self._ids([{"role": "user", "content": "1"}, {"role": "assistant", "content": _PROBE}])
        reply = bisect_left(range(len(ids)), True, key=lambda n: _PROBE in self.decode(ids[: n + 1]))
        first = next((at for at in range(reply, len(ids)) if ids[at] in self._special_ids), len(ids))
        return ids[first:]

    def _end(self, ids: Sequence[int]) -> int | None:
        """Where the reply at the end of a conversation ends, its end token included; None where no special token ends it."""
        ended = self._tail and list(ids[-len(self._tail) :]) == self._tail
        return len(ids) - len(self._tail) + 1 if ended else None

    def _ids(self, messages: Sequence[Message], reply_next: bool = False) -> list[int]:
        options = {"tokenize": True, "return_dict": False, "add_generation_prompt": reply_next}
        tokenizer = self.tokenizer if reply_next else self._whole_tokenizer
        if self._marked(messages):
            options["sanitize_control_tokens"] = True
        return list(self._apply(tokenizer, messages, **options))

    def _apply(self, tokenizer: Any, messages: Sequence[Message], **options: Any) -> Any:
        from jinja2 import TemplateSyntaxError

        try:
            turns = self._thoughts_apart(messages) if self._marked(messages) else messages
            return tokenizer.apply_chat_template(self._shaped(turns), **options, **self.kwargs)
        except TemplateSyntaxError as error:
            why = " ".join(str(error.message).split())
            raise RealignerError(f"the host's chat template, line {error.lineno}: {why}") from None
        except RealignerError:
            raise
        except Exception as error:  # a template raises whatever its author chose
            why = " ".join(str(error).split()) or type(error).__name__
            raise RealignerError(f"the host's chat template refuses the conversation: {why}") from None

    @cached_property
    def _whole_tokenizer(self) -> Any:
        """What renders conversations that end in a reply: Mistral's own tokenizer does so in another mode only."""
        path = None if self._renders_text else getattr(self.tokenizer, "_tokenizer_path", None)
        return self.tokenizer if path is None else type(self.tokenizer)(path, mode="finetuning")

    @cached_property
    def _renders_text(self) -> bool:
        """Whether the template makes a text that is then tokenised (Mistral's own tokenizer makes tokens)."""
        return "sanitize_control_tokens" in signature(self.tokenizer.apply_chat_template).parameters

    def _marked(self, messages: Sequence[Message]) -> bool:
        """Whether a text holds what the tokenizer would take for an added token."""
        if not self._renders_text:
            return False
        return any(self._marks.search(value) for message in messages for value in message.values() if isinstance(value, str))

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        added = getattr(self.tokenizer, "added_tokens_decoder", None)
        texts = {token.content for token in added.values()} if isinstance(added, dict) else set()
        texts |= {str(token) for token in self.tokenizer.all_special_tokens}
        # Two private characters mark them within transformers, which leaves these out of a text.
        texts |= {"\U000f0000", "\U000f0001"}
        return re.compile("|".join(map(re.escape, sorted(filter(str.strip, texts), key=len, reverse=True))))

    @cached_property
    def _special_ids(self) -> set[int]:
        added = getattr(self.tokenizer, "added_tokens_decoder", None)
        found = {number for number, token in added.items() if token.special} if isinstance(added, dict) else set()
        return found | set(self.tokenizer.all_special_ids)

    def _text_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens as text, special ones too, nothing cleaned up."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @property
    def cleans_up(self) -> bool:
        """Whether decoding takes blanks out before punctuation; transformers leaves those of BPE alone, unless it is forced."""
        model = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
        forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
        alone = type(model).__name__ == "BPE" and not getattr(self.tokenizer, forced, False)
        return bool(getattr(self.tokenizer, "clean_up_tokenization_spaces", False)) and not alone

    def _cut(self, ids: Sequence[int], text: str) -> int | None:
        """How many of the tokens make up a text that they begin with; None where it ends within one."""
        count = bisect_left(range(len(ids) + 1), len(text), key=lambda n: len(self.decode(ids[:n])))
        return count if self.decode(ids[:count]) == text else None

    # What the template leaves out in silence.

    @cached_property
    def _as_parts(self) -> bool:
        """Whether the template wants a message's content as a list of parts."""
        if not self._renders_text:
            return False
        asks = {"role": "user", "content": _PROBE}
        parts = {"role": "user", "content": [{"type": "text", "text": _PROBE}]}
        if self._writes([asks]) is not False:
            return False
        if self._writes([parts]):
            return True
        raise RealignerError("the host's chat template leaves out what the user says")

    def _writes(self, messages: Sequence[Mapping[str, Any]], reply_next: bool = True) -> bool | None:
        """Whether the probe is in the template's text; None when it refuses the conversation."""
        try:
            text = self._rendered(messages, reply_next)
        except Exception:  # which comes up again where a real conversation is rendered
            return None
        return isinstance(text, str) and _PROBE in text

    def _writes_thought(self, conversation: Sequence[Message]) -> bool:
        """Whether the template writes the thought of the last reply."""
        probe = [*conversation[:-1], {**conversation[-1], "reasoning_content": _PROBE}]
        return not self.is_plain and self._writes(self._shaped(probe), reply_next=False) is not False

    def _rendered(self, messages: Sequence[Mapping[str, Any]], reply_next: bool = False) -> Any:
        options = {"tokenize": False, "add_generation_prompt": reply_next}
        return self.tokenizer.apply_chat_template([dict(message) for message in messages], **options, **self.kwargs)

    def _shaped(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages in the form that the template takes them in: content as text, or as a list of parts."""
        if self._as_parts:
            return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        return [dict(message) for message in messages]

    def _check_roles(self, messages: Sequence[Message]) -> None:
        """Raise when the template leaves out, without a word, what one of the roles says."""
        if not self._renders_text:
            return
        for number, message in enumerate(messages):
            key = message["role"], number == 0
            if message["role"] == "user":
                continue
            if key not in self._sees:
                asks, replies = {"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}
                said = {"role": message["role"], "content": _PROBE}
                probe = [said, asks] if number == 0 else [asks, said, asks] if key[0] == "assistant" else [asks, replies, said]
                probe += [asks] if number and key[0] == "system" else []
                self._sees[key] = self._writes(self._shaped(probe)) is not False
            if not self._sees[key]:
                raise RealignerError(f"the host's chat template leaves out what the role {message['role']!r} says")

    # The plain form.

    @cached_property
    def _before(self) -> list[int]:
        """The tokens that the tokenizer puts before every text."""
        ids, bare = (list(self.tokenizer("1", add_special_tokens=added)["input_ids"]) for added in (True, False))
        return next((ids[:at] for at in range(len(ids)) if ids[at : at + len(bare)] == bare), [])

    def _plain_ids(self, text: str) -> list[int]:
        if self._renders_text and self._marks.search(text):
            return list(self._splitting(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def _splitting(self) -> Any:
        """A copy of the tokenizer, for texts with typed marks: what is asked of one thread's call would hold for all."""
        return deepcopy(self.tokenizer)


def ends_in_byte(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Whether the last token is a byte (``<0xF0>``), to which some tokenizers fall back for characters that they lack.

    A run of bytes is decoded as one: where it is not UTF-8 as a whole, each of them becomes a replacement character.
    """
    return bool(ids) and _BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(ids[-1]))) is not None


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer renders conversations: by a chat template, or in a way of its own as mistral-common's does."""
    from transformers import PreTrainedTokenizerBase

    own = getattr(type(tokenizer), "apply_chat_template", None)
    return bool(getattr(tokenizer, "chat_template", None)) or own not in (None, PreTrainedTokenizerBase.apply_chat_template)


def check_template_kwargs(given: Any) -> None:
    """Raise unless `given` is None or holds variables for a chat template, as JSON values."""
    if given is None:
        return
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise UsageError(f"chat_template_kwargs: {str(given)[:_SHOWN]!r} is not a mapping from names to values")
    if taken := sorted(_OWN & set(given)):
        raise UsageError(f"chat_template_kwargs: {taken[0]!r} is not a variable of a chat template")
    for name in WITHOUT_THOUGHT:
        if not isinstance(given.get(name, True), bool):  # "false" and 0 would be taken for true
            raise UsageError(f"chat_template_kwargs: {name} is {str(given[name])[:_SHOWN]!r}; it is true or false")
    try:
        size = len(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"chat_template_kwargs: not JSON values ({error})") from None
    if size > _MOST_KWARGS:
        raise UsageError(f"chat_template_kwargs: {size:,} characters; {_MOST_KWARGS:,} at most")


def prompt_ids(
    tokenizer: Any,
    prompt: Prompt,
    template: str = "chat",
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens that a host reads before it replies; see `ChatFormat.prompts`."""
    return ChatFormat(tokenizer, template, chat_template_kwargs).prompts([prompt], system)[0]
