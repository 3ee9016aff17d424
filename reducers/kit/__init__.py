"""What several methods share: choosing, clustering, pairing, learned parts. Methods import it and never one another.

selection        ranking patches, keeping the highest, how many
clustering       distances, centres, from labels to a merge
pairs            bipartite matching and its merge, for methods that merge in pairs
ranked_merge     pruning and merging down a ranking
grid             what is told by the places of patches: patterns, smaller grids
back_tracking    which tokens attention, traced back from the output, will read
keep_predictor   learned keep or drop: predictor, stages, losses
learned_pooling  patches become mixes of themselves by learned weights
halting          the sums of tokens that halt by themselves
"""
