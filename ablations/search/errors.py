"""What a search refuses."""

from __future__ import annotations


class SearchError(ValueError):
    """A search that cannot be carried out, or a file of one that cannot be read; the message names the remedy."""
