"""The figures: one a file, each a function from facts to a matplotlib ``Figure``, and a ``Plot`` that says when it is
drawn. ``questions`` says which a spec gets; those of ``shared`` belong to no single spec.
"""

from analysis.plots.base import Drawn, Plot, Sample, Scene

__all__ = ["Drawn", "Plot", "Sample", "Scene"]
