"""The exception tree. Every message is one sentence: what with its value, where, what to do.

VLMGRPOError
├── ConfigError (ValueError)          a config file, option or command line that cannot work
├── DataFormatError (ValueError)      a dataset row that cannot be read as a sample
├── MediaError (OSError)              a medium that cannot be opened or is not what it says
├── EncodingError (ValueError)        a processor whose output does not match the row's media
├── OverlongError (ValueError)         a prompt of more tokens than the run allows
├── RewardError (ValueError)          a reward that cannot be resolved or called
├── FlowError (RuntimeError)          media that do not reach the loss, or not as generation sees them
├── GradientError (RuntimeError)      a trained tower that receives no gradient
├── NumbersError (FloatingPointError)  a loss, gradient, logit or weight that became NaN or infinite
├── SharingError (RuntimeError)       shared work in a group where it would not be exact
├── CheckpointError (RuntimeError)    a run folder that cannot be continued
├── ExportError (RuntimeError)        an export that is not the run it was made from
└── UnsupportedError (NotImplementedError)  a combination that has no test yet, or that cannot work here
"""


class VLMGRPOError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(VLMGRPOError, ValueError):
    """A config file, an option or a command line that cannot work."""


class DataFormatError(VLMGRPOError, ValueError):
    """A dataset row that cannot be read as a sample."""


class MediaError(VLMGRPOError, OSError):
    """A medium that cannot be opened, or is not what it says."""


class EncodingError(VLMGRPOError, ValueError):
    """A processor whose output does not match the media of the row."""


class OverlongError(VLMGRPOError, ValueError):
    """A prompt of more tokens than the run allows."""


class RewardError(VLMGRPOError, ValueError):
    """A reward that cannot be resolved or called."""


class FlowError(VLMGRPOError, RuntimeError):
    """Media that do not reach the loss, or not as generation sees them."""


class GradientError(VLMGRPOError, RuntimeError):
    """A trained tower that receives no gradient."""


class NumbersError(VLMGRPOError, FloatingPointError):
    """A loss, a gradient, a logit or a weight that became NaN or infinite."""


class SharingError(VLMGRPOError, RuntimeError):
    """Group sharing that was demanded where it would not be exact."""


class CheckpointError(VLMGRPOError, RuntimeError):
    """A run folder that cannot be continued."""


class ExportError(VLMGRPOError, RuntimeError):
    """An export that is not the run it was made from, or that could not be made; nothing of it is kept."""


class UnsupportedError(VLMGRPOError, NotImplementedError):
    """A combination that has no test yet, or that cannot work on this machine."""


def nearest(name: str, known: list[str]) -> str:
    """``' Did you mean "x"?'`` for the closest of ``known``, or an empty string."""
    import difflib

    match = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f' Did you mean "{match[0]}"?' if match else ""
