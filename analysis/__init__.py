"""From result files to figures, tables and a report.

Reads what an ablation run left in its output folder and nothing else: no model, no torch, of the other packages of
the project the format of results (``ablations.records``). ``python -m analysis OUT`` does it all; every part is also a
function of data frames:

    frame       the result files as tidy data frames
    outcomes    which images each trial answers rightly, in one order: what every test rests on
    matching    which trials may be set beside each other: seeds, and equal cost
    stats       intervals, paired tests, and what a number of images can tell
    kept        which patches survive, and how far two trials agree about them
    drawing     matplotlib as it ships, whatever its user set up
    style       colours, markers, labels and titles, the same in every figure
    plots       one figure a file: data frames -> matplotlib Figure
    tables      data frames -> tables in Markdown, CSV and LaTeX
    published   the numbers in print that a table of ours may be read beside
    beside      each published claim with what was measured here nearest to it
    comparison  series side by side at one cost, tested in pairs
    findings    the answers in plain sentences, computed from the data; ``questions``: one spec's own
    caveats     what to know before believing an experiment's numbers
    report      all of it; ``page``: in one self-contained HTML file
"""

from analysis.drawing import bring_in

bring_in()  # before any module of ours, or seaborn, imports it as the environment says
