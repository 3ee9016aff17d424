"""From result files to figures, tables and a report.

Reads what an ablation run left in its output folder and nothing else: no model, no torch, no other package of
the project. ``python -m analysis OUT`` does it all; every part is also a function of data frames:

    frame       the result files as tidy data frames
    matching    which trials may be set beside each other: seeds, and equal cost
    stats       intervals, paired tests, and what a number of images can tell
    style       colours, markers, labels and titles, the same in every figure
    plots       one figure a file: data frames -> matplotlib Figure
    tables      data frames -> tables in Markdown, CSV and LaTeX
    published   the numbers in print that a table of ours may be read beside
    comparison  series side by side at one cost, tested in pairs
    findings    the answers in plain sentences, computed from the data
    report      all of it in one self-contained HTML file
"""
