"""The errors a user can cause; each message names the cause and the remedy."""


class ReducerError(ValueError):
    """A reducer, budget or placement that cannot work as asked."""


class UnsupportedModel(ReducerError):
    """A model whose blocks this runtime does not restate exactly, and therefore refuses."""
