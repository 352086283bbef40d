"""The errors a user can mend. Each message is one sentence: what, the value, what to do."""


class TextPolicyError(Exception):
    """Base of every error below; the command line prints its message and exits with code 2."""


class UserError(TextPolicyError, ValueError):
    """A setting, file or argument that cannot work."""


class MissingDependencyError(TextPolicyError, ImportError):
    """An optional package is absent; the message carries the install line."""


class RewardError(TextPolicyError, RuntimeError):
    """A reward function raised, or returned something that is not a number."""
