"""Whether two processors make the same of a prompt: then one encoding serves policy and reward model."""

from typing import Any

_PARTS = ("image_processor", "video_processor", "feature_extractor")


def difference(theirs: Any, their_template: dict[str, Any], own: Any, own_template: dict[str, Any]) -> str | None:
    """Why a policy's prompts are not what a reward model would make of the rows itself; None where they are.

    Args:
        theirs, own: the two processors.
        their_template, own_template: what is given to the chat template of each.
    """
    if type(theirs) is not type(own):
        return f"its processor is a {type(own).__name__}, and the policy's a {type(theirs).__name__}"
    words, own_words = (getattr(processor, "tokenizer", processor).get_vocab() for processor in (theirs, own))
    if words != own_words:
        return "its tokens are others than the policy's"
    for part in _PARTS:
        if _facts(getattr(theirs, part, None)) != _facts(getattr(own, part, None)):
            return f"its {part.replace('_', ' ')} is set otherwise than the policy's"
    templates = (_whole(theirs, their_template), _whole(own, own_template))
    return None if templates[0] == templates[1] else "its chat template is another one than the policy's"


def _facts(part: Any) -> str | None:
    return None if part is None else part.to_json_string()


def _whole(processor: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"chat_template": getattr(processor, "chat_template", None), **given}
