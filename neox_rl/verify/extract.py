"""Which part of a text is its final answer. One answer or none: what is read never depends on the gold answer. Pure.

The text after the last ``</think>`` is read, at most its last ``MAX_TAIL_CHARS`` characters. In it:

1. the latest of: ``\\boxed{}`` (neighbors joined into a list), ``<answer>``, ``####``, "final answer is/:", in any order;
2. else the latest "answer is/:" (also in French, Spanish, German, Chinese ...) that a formula follows;
3. else, where the text is a bare answer and no prose, all of it;
4. else the last formula between math delimiters or plain number, whichever ends later. ``$`` and ``\\(`` set a formula inside a
   line: what they part from the text by line breaks is not read here.

With ``marked``, 4 is left out. A text that wavers ("5 or maybe 6", "not 5", "at most 5") gives no number: it is its own answer.

After 2 the answer is the first formula: "the answer is 5 because 2+3=7" says 5.
"""

from __future__ import annotations

import re

MAX_TAIL_CHARS = 16_384
MAX_ANSWER_CHARS = 2_000
MAX_BOX_DEPTH = 3

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_UNBRACED_BOX = re.compile(r"\\boxed\s+([^\s{$\\.]+)")
_ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.IGNORECASE | re.DOTALL)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_FINAL = re.compile(r"final\s+answer\**\s*(?:[^.\n$\\:]{0,40}?\bis\b|:)(?:\s|\*|:)*(?!the\s+final)", re.IGNORECASE)
_ANSWER = re.compile(
    r"(?:\banswer\b|\br[\u00e9e]ponse\b|\brespuesta\b|\bantwort\b|\brisposta\b|\u7b54\u6848|\u5e94\u586b)\**\s*"
    r"(?:would be|should be|must be|is|est|es|ist|\u662f|\u4e3a|:|\uff1a)(?:\s|\*|:)*",
    re.IGNORECASE,
)
_MATH = re.compile(
    r"(?<!\\)\$\$(?P<a>.+?)(?<!\\)\$\$|(?<!\\)\\\[(?P<b>.+?)(?<!\\)\\\]"
    r"|(?<![\\\d])\$(?P<c>(?:\\\$|[^$]){1,2000}?)(?<!\\)\$|(?<!\\)\\\((?P<d>.+?)(?<!\\)\\\)",
    re.DOTALL,
)
_BROKEN_INLINE = re.compile(r"(?<![\\$])\$[ \t]*\n[^$\n]*\n[ \t]*\$(?!\$)|\\\([ \t]*\n[^\n]*\n[ \t]*\\\)")
_JOIN = re.compile(r"(?:\s|\$|\\[()\[\],;]|\\q?quad|,|;|and|or|\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\})*")
_OTHER_SCRIPTS = "\u0600-\u06ff\u0900-\u097f\u3040-\u9fff"
_WORD = re.compile(rf"(?<![A-Za-z\\\d])[A-Za-z\u00c0-\u024f]{{3,}}(?![A-Za-z])|[{_OTHER_SCRIPTS}]+")
_COMMAND = re.compile(
    r"\\(?:begin|end)\{[^{}]*\}|\\(?:text|mathrm|textbf|mbox|operatorname|textnormal|textit)\s*\{[^{}]*\}"
    r"|\\[A-Za-z]+|[A-Za-z]?_\{[^{}]*\}"
)
# "\frac" read as an escape leaves a form feed and "rac": a corruption common in JSON that was written by hand.
_ESCAPES = {"\x0c": r"\f", "\x08": r"\b"}
_EATEN = re.compile("[\x0c\x08](?=[a-z])")
FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp sqrt frac max min gcd lcm mod det inf infinity and "
        "percent pct percentage",
    )
)
_NO_VALUE = r"(?:not|neither|either|less than|more than|greater than|at most|at least|between|maybe|perhaps|possibly|any(?:thing)?|one of)"
_EVADES = re.compile(rf"(?:\s|\\text\s*\{{|[$(])*{_NO_VALUE}\b", re.IGNORECASE)
_WAVERS = re.compile(r"\b(?:maybe|perhaps|possibly|alternatively)\b|[\d})]\s*\(?\s*\bor\b\s*[\d$\\]", re.IGNORECASE)
_EVADED_NUMBER = re.compile(rf"\b(?:{_NO_VALUE}|or|alternatively)\s*[$(]*$", re.IGNORECASE)
_DENIED_NUMBER = re.compile(r"[\s$)]*(?:is|was)\s+(?:not|wrong|incorrect|false)\b", re.IGNORECASE)
_DECIMAL = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_PLAIN = re.compile(rf"(?<![A-Za-z0-9_.\\])[-\u2212]?[\u20ac\u00a3\u00a5$]?{_DECIMAL}(?:\s*[-+*/^\u00d7\u00f7]\s*{_DECIMAL})*(?:\s*\\?%)?")
_START = re.compile(r"[\s*]*(?:(?:approximately|about|simply|just|equal to|that|equals?|the number|x\s*=)\s+)*[:=]?\s*", re.IGNORECASE)


def tail(text: str) -> str:
    """What is read of a text: after the last ``</think>``, at most ``MAX_TAIL_CHARS``; empty when thinking never ended."""
    head, end, rest = text.rpartition("</think>")
    if not end and "<think>" in text:
        return ""
    text = (rest if end else head + rest)[-MAX_TAIL_CHARS:]
    return _EATEN.sub(lambda m: _ESCAPES[m[0]], text) if _EATEN.search(text) else text


def final_answer(text: str, marked: bool = False) -> str:
    """The final answer's text without math delimiters, empty when there is none. Reads ``tail(text)``."""
    text = _UNBRACED_BOX.sub(r"\\boxed{\1}", tail(text).strip())
    explicit = _marked(text)
    if explicit is not None:
        return _unwrap(explicit)[:MAX_ANSWER_CHARS]
    for match in reversed(list(_ANSWER.finditer(text))):
        found = leading_formula(text[match.end() :])
        if found:
            return found[:MAX_ANSWER_CHARS]
    text = _BROKEN_INLINE.sub(" ", text)
    if marked and not is_bare(text):
        return ""
    return (_unwrap(text) if is_bare(text) or _formulas(text) else _last_formula(text))[:MAX_ANSWER_CHARS]


def _marked(text: str) -> str | None:
    """The content of the latest explicit marker, None without one."""
    found: list[tuple[int, str]] = []
    boxes = _boxes(text)
    if boxes is not None:
        found.append(boxes)
    for pattern in (_ANSWER_TAG, _HASHES):
        matches = list(pattern.finditer(text))
        if matches:
            inner = matches[-1].group(1)
            nested = _boxes(inner)
            found.append((matches[-1].start() + 1, nested[1] if nested else inner.strip()))
    finals = [(m.start(), leading_formula(text[m.end() :])) for m in _FINAL.finditer(text)]
    found += [(at, answer) for at, answer in finals[-1:] if answer]
    if not found:
        return None
    # "Final answer: \boxed{5}" holds two markers: the later one is the box, exactly delimited.
    return max(found)[1]


def _boxes(text: str, depth: int = 0) -> tuple[int, str] | None:
    """Start and content of the last box; boxes with only separators (or under 10 characters) between are one list.

    Of a box in a box the inner one counts.
    """
    spans: list[tuple[int, int, str]] = []
    for match in _BOX.finditer(text):
        if spans and match.start() < spans[-1][1]:
            continue
        end = _closing(text, match.end())
        inner = _boxes(text[match.end() : end], depth + 1) if depth < MAX_BOX_DEPTH else None
        content = inner[1] if inner else text[match.end() : end].strip()
        spans.append((match.start(), end + 1, content))
    if not spans:
        return None
    parts = [spans[-1][2]]
    for (_, left_end, content), (right_start, _, _) in zip(spans[-2::-1], spans[:0:-1], strict=False):
        between = text[left_end:right_start]
        if not (_JOIN.fullmatch(between) or (len(between) < 10 and not re.search(r"[A-Za-z=.\n]", between))):
            break
        if content not in parts:
            parts.insert(0, content)
    return spans[-1][0], ", ".join(parts)


def _closing(text: str, start: int) -> int:
    """Index of the brace that closes the group opened before ``start``; the end of the text when none does."""
    depth = 1
    for i in range(start, len(text)):
        if text[i] in "{}" and text[i - 1] != "\\":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return i
    return len(text)


def _formulas(text: str) -> list[re.Match[str]]:
    """Text between math delimiters, except where the dollar signs are money in a sentence."""
    return [m for m in _MATH.finditer(text) if len(_words(_inner(m))) < 2]


def _words(text: str) -> list[str]:
    return [w for w in _WORD.findall(_COMMAND.sub(" ", text)) if w.lower() not in FUNCTIONS]


def _unwrap(answer: str) -> str:
    """Without emphasis and delimiters around it; what is left of a sentence is its last formula."""
    answer = answer.strip().strip('*"').removesuffix("\\").strip()
    answer = answer[1:-1] if len(answer) > 2 and answer[0] == answer[-1] == "'" else answer
    if _EVADES.match(answer) or (_WAVERS.search(answer) and _words(_undelimited(answer))):
        return _undelimited(answer)
    formulas = _formulas(answer)
    if not formulas and _words(_undelimited(answer)):
        return answer if is_bare(answer) else leading_formula(answer) or _last_formula(answer)
    if not formulas:
        return _undelimited(answer)
    if re.search(r"[A-Za-z]{2,}", _COMMAND.sub("", answer[: formulas[0].start()])):
        return _last_formula(answer)
    outside = _MATH.sub(" ", answer)
    if (
        not _words(_undelimited(answer))
        or not re.search(r"[A-Za-z0-9]", _JOIN.sub(" ", outside))
        or (answer.startswith(("$", "\\(", "\\[")) and len(outside.split()) <= 3)
    ):
        return _undelimited(answer)
    if len(formulas) == 1 and is_bare(answer) and not _words(outside):
        return _undelimited(answer)
    return _last_formula(answer)


def _undelimited(text: str) -> str:
    return re.sub(r"(?<!\\)\$|(?<!\\)\\[()\[\]]", "", _MATH.sub(lambda m: f" {_inner(m)} ", text)).strip()


def _inner(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None)


def is_bare(text: str) -> bool:
    """Whether a text is an answer by itself: short, one line, and not a sentence."""
    if len(text) > 400 or ("\n" in text and "\\begin" not in text):
        return False
    if re.search(f"[{_OTHER_SCRIPTS}]", text):
        return False
    words = _words(text)
    if not re.search(r"[\d=]|\\(?!text)", text):
        return len(words) < 8
    if re.search(r"\b(?:is|are|was|were|equals)\b", text):
        return False
    # A unit may follow a number; a formula after words makes it a sentence.
    after = text.rpartition(words[0])[2] if words else ""
    return not words or (len(words) <= 2 and not text[:1].isalpha() and not re.search(r"[\d=]", after))


def leading_formula(rest: str) -> str:
    """The first formula of the sentence that follows "the answer is"; empty when the sentence has none."""
    rest = rest[_start(rest) :].lstrip('"\u201c ').removeprefix('\\"')
    if _EVADES.match(rest):
        return rest.partition("\n")[0].strip()
    match = _MATH.match(rest)
    if match and len(_words(_inner(match))) < 2:
        return _joined(rest, match)
    box = _boxes(rest)
    if box and box[0] == 0:
        return box[1]
    line = re.split(r"\n|\.(?=\s|$)|\u3002|<\|", rest, maxsplit=1)[0].strip()
    if is_bare(line) and not _formulas(line):
        return line
    masked = _COMMAND.sub(lambda m: "0" * len(m[0]), line)
    prose = next((m for m in _WORD.finditer(masked) if m[0].lower() not in FUNCTIONS), None)
    if prose and _WAVERS.match(prose[0]):
        return line
    span = line[: prose.start()].rstrip(" ,;:(").lstrip(" ,;:") if prose else line
    if re.search(r"[\dA-Za-z]", span):
        return span
    # The sentence starts with words: its formula is what it says something "is".
    said = list(re.finditer(r"\b(?:is|are|be|equals)\b|\u662f|\u4e3a", line))
    after = leading_formula(line[said[-1].end() :]) if said else ""
    return after or _first_formula(line)


def _joined(rest: str, match: re.Match[str]) -> str:
    """A formula and those that "and", "or" or a comma add to it."""
    box = _boxes(_inner(match))
    parts = [box[1] if box else _inner(match).strip()]
    end = match.end()
    while (join := re.match(r"\s*(?:,?\s*(?:and|or)\b|,)\s*", rest[end:])) and (more := _MATH.match(rest, end + join.end())):
        parts.append(_inner(more).strip())
        end = more.end()
    percent = re.match(r"\s*(?:\\?%|percent)", rest[end:])
    return ", ".join(parts) + (r"\%" if percent and len(parts) == 1 else "")


_BARE_FRACTION = re.compile(r"-?\\d?frac\{[^{}]{1,40}\}\{[^{}]{1,40}\}")


def _first_formula(line: str) -> str:
    found = [m for m in (*_formulas(line)[:1], _BARE_FRACTION.search(line), _PLAIN.search(line)) if m]
    first = min(found, key=lambda m: m.start(), default=None)
    return "" if first is None else _inner(first).strip() if first.re is _MATH else first[0]


def _start(rest: str) -> int:
    match = _START.match(rest)
    return match.end() if match else 0


def _last_formula(text: str) -> str:
    maths = _formulas(text)
    # Numbers inside a formula belong to it.
    masked = text
    for m in maths:
        masked = masked[: m.start()] + " " * len(m[0]) + masked[m.end() :]
    candidates = [*list(_PLAIN.finditer(masked))[-1:], *list(_BARE_FRACTION.finditer(masked))[-1:]]
    if not candidates:
        candidates = list(re.finditer(r"(?<![\d.,])\d[\d,]*(?:\.\d+)?(?:/\d+)?\s*%?", masked))[-1:]
    last = max(candidates, key=lambda m: m.end(), default=None)
    if maths and (last is None or maths[-1].end() > last.end()):
        first = len(maths) - 1
        while first and _JOIN.fullmatch(text[maths[first - 1].end() : maths[first].start()].strip() or "x"):
            first -= 1
        return _joined(text, maths[first]) if first < len(maths) - 1 else _inner(maths[-1]).strip()
    if last is None or _EVADED_NUMBER.search(text, max(0, last.start() - 40), last.start()) or _DENIED_NUMBER.match(text, last.end()):
        return ""
    return last[0].strip().rstrip(",")
