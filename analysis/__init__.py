"""From result files to figures, tables and a report.

Reads what an ablation run left in its output folder and nothing else: no model, no torch, of the other packages of
the project the format of results (``ablations.records``). ``python -m analysis OUT`` does it all; every part is also a
function of data frames:

    frame       the result files as tidy data frames
    facts/      what follows from a spec's trials, computed once for words, tables and figures: which trials may be set
                beside each other, comparisons at equal cost, the front, speed-ups, which patches survive
    stats       intervals, paired tests, and what a number of images can tell
    questions/  what is asked, one kind a file: its noun, its findings, its figures, what is in print about it
    words       findings, and what several questions say alike; ``findings``: of all specs together
    caveats     what to know before believing an experiment's numbers
    plots/      one figure a file: facts -> matplotlib Figure
    style       colours, markers, labels and titles, the same in every figure; ``drawing``: matplotlib as it ships
    tables      tables in Markdown, CSV and LaTeX
    published   the numbers in print that a table of ours may be read beside
    report      all of it; ``page``: in one self-contained HTML file
"""

from analysis.drawing import bring_in

bring_in()  # before any module of ours, or seaborn, imports it as the environment says
