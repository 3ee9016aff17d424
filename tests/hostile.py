"""Settings of matplotlib that no figure may depend on."""

RC = """\
backend: module://nobodys_backend
text.usetex: True
font.size: 31
lines.linewidth: banana
savefig.bbox: tight
savefig.transparent: True
figure.autolayout: True
figure.constrained_layout.use: False
axes.formatter.use_locale: True
axes.facecolor: red
axes.grid.axis: x
svg.fonttype: none
path.sketch: 1, 100, 2
image.cmap: jet
"""
