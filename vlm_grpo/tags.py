"""The tags that answers are written in. ``find()`` and no regular expression: those take hours on hostile texts."""


def span(text: str, tag: str) -> tuple[int, int] | None:
    """Start and end of the first ``<tag>…</tag>``, tags included; the first closing tag behind the first opening."""
    start = text.find(f"<{tag}>")
    end = -1 if start < 0 else text.find(f"</{tag}>", start)
    return None if end < 0 else (start, end + len(tag) + 3)


def answer_body(text: str) -> str:
    """The body of the first ``<answer>…</answer>``, or the whole text when there is none."""
    found = span(text, "answer")
    return text if found is None else text[found[0] + len("<answer>") : found[1] - len("</answer>")]
